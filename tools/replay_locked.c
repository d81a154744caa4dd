#include "experts/locked.h"
#include "tools/replay.h"

#define MOVES_MAX 16u

struct account {
    double covered, total;
    uint64_t n_reads;
};

static void decode_visit(struct slu_locked *locked, const struct slu_policy_choice *choice,
                         struct account *account)
{
    for (uint32_t i = 0; i < choice->n; i++) {
        double weight = choice->weights[i];
        account->total += weight;
        account->covered += slu_locked_has(locked, choice->layer, choice->experts[i]) ? weight : 0;
    }
    struct slu_locked_move moves[MOVES_MAX];
    slu_locked_observe(locked, choice);
    account->n_reads += slu_locked_move(locked, moves, MOVES_MAX);
}

int slu_replay_locked(const struct slu_route_trace *trace, uint32_t n_resident,
                      float reads_per_token, struct slu_replay_locked *ret_result,
                      struct slu_err *err)
{
    struct slu_locked *locked =
        slu_locked_create(&(struct slu_locked_params){.n_layers = trace->n_layers,
                                                      .n_experts = trace->n_experts,
                                                      .n_resident = n_resident,
                                                      .reads_per_token = reads_per_token});
    if (!locked) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a locked set of %u experts", n_resident);
    }
    struct account account = {0};
    bool was_decoding = false;
    for (uint32_t i = 0; i < trace->n_visits; i++) {
        const struct slu_route_visit *visit = &trace->visits[i];
        const struct slu_policy_choice choice = {.token = visit->token,
                                                 .layer = visit->layer,
                                                 .n = visit->n,
                                                 .experts = &trace->experts[visit->first],
                                                 .weights = &trace->weights[visit->first]};
        if (!visit->is_decoding) {
            slu_locked_observe(locked, &choice);
        } else {
            if (!was_decoding) {
                slu_locked_choose(locked);
            }
            decode_visit(locked, &choice, &account);
        }
        was_decoding = visit->is_decoding;
    }
    slu_locked_destroy(locked);
    uint32_t n_tokens = trace->n_decoded_tokens;
    *ret_result = (struct slu_replay_locked){
        .n_resident = n_resident,
        .reads_per_token = reads_per_token,
        .covered_router_weight = account.total > 0 ? account.covered / account.total : 0,
        .experts_read_per_token = n_tokens > 0 ? (double)account.n_reads / n_tokens : 0,
    };
    return 0;
}
