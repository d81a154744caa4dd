/*
 * What adapters cost: swapping a resident one, loading one from flash beside the bandwidth that
 * the same flash gives in the same run, and decoding with one beside decoding without, in turns.
 * For adapters of experts, the last also with only a part of their experts in memory.
 *
 *     build/bench/adapters MODEL.slu [RANK [TOKENS [experts [PART]]]]
 *
 * The adapters are random, on the attention of MODEL.slu or on that and the routed experts, F32.
 * PART is how much of the experts' is in memory, 0.25 if nothing else is said.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "io/ring.h"
#include "session.h"
#include "tools/adapter_import.h"
#include "tools/adapter_synth.h"

#define ROUNDS     7
#define READ_BYTES (1u << 20)
#define N_READS    256u
#define DEPTH      16u

static void must(int rc, const struct slu_err *err)
{
    if (rc < 0) {
        fprintf(stderr, "adapters: %s\n", err->text);
        exit(1);
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t n)
{
    qsort(values, n, sizeof *values, compare);
    return values[n / 2];
}

/* Bytes a second of direct 1 MiB reads, 16 in flight, spread over the file. */
static double flash_bandwidth(const char *path)
{
    struct slu_err err = {0};
    struct slu_ring *ring;
    struct stat st;
    must(slu_ring_open(path, &(struct slu_ring_params){.depth = DEPTH}, &ring, &err), &err);
    if (stat(path, &st) < 0 || (uint64_t)st.st_size < READ_BYTES) {
        exit(1);
    }
    char *buffers = aligned_alloc(READ_BYTES, (size_t)DEPTH * READ_BYTES);
    memset(buffers, 1, (size_t)DEPTH * READ_BYTES);
    uint64_t places = (uint64_t)st.st_size / READ_BYTES, n_submitted = 0, n_done = 0;
    double start_s = slu_now_s();
    while (n_done < N_READS) {
        while (n_submitted < N_READS && n_submitted - n_done < DEPTH) {
            struct slu_read read = {.buffer = buffers + n_submitted % DEPTH * READ_BYTES,
                                    .offset = n_submitted * 7919 % places * READ_BYTES,
                                    .bytes = READ_BYTES,
                                    .tag = n_submitted};
            must(ring->submit(ring, &read, &err), &err);
            n_submitted++;
        }
        struct slu_read_done done[DEPTH];
        n_done += (uint64_t)ring->wait(ring, done, DEPTH, true);
    }
    double seconds = slu_now_s() - start_s;
    slu_ring_destroy(ring);
    free(buffers);
    return (double)N_READS * READ_BYTES / seconds;
}

static void drop_cache(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        fdatasync(fd);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
}

static double decode_s(struct slu_session *session, uint32_t n_tokens)
{
    struct slu_err err = {0};
    int32_t prompt[] = {9, 8, 7, 6};
    must(slu_session_replace(session, prompt, 4, &err), &err);
    struct slu_result result;
    struct slu_generate_params params = {.n_max = n_tokens, .ignore_end = true};
    must(slu_session_generate(session, &params, &result, &err), &err);
    return result.decode_s / (n_tokens - 1);
}

static void make_adapter(const char *model, const char *dir, unsigned rank, unsigned seed,
                         uint32_t targets, char *ret_sla, size_t bytes,
                         struct slu_adapter_info *ret_info)
{
    struct slu_err err = {0};
    char gguf[96];
    snprintf(gguf, sizeof gguf, "%s/a.gguf", dir);
    snprintf(ret_sla, bytes, "%s/a%u.sla", dir, seed);
    struct slu_adapter_synth_params params = {
        .base = model, .rank = rank, .seed = seed, .targets = targets};
    must(slu_adapter_synth_write(gguf, &params, &err), &err);
    must(slu_adapter_import(
             &(struct slu_adapter_import_params){.in = gguf, .out = ret_sla, .base = model},
             ret_info, &err),
         &err);
    unlink(gguf);
}

/* Decoding with so large a part of the adapter's experts in memory. */
static void run_streamed(const char *model, const char *sla, const struct slu_adapter_info *info,
                         double part, uint32_t n_tokens)
{
    struct slu_err err = {0};
    struct slu_engine *engine;
    struct slu_session *session;
    double experts = part * (double)info->expert_bytes;
    struct slu_engine_params params = {.ctx = 256, .adapters_at_once = 1};
    params.adapter_bytes = info->memory_bytes - info->expert_bytes + (uint64_t)experts;
    must(slu_engine_open(model, &params, &engine, &err), &err);
    must(slu_session_create(engine, NULL, &session, &err), &err);
    double start_s = slu_now_s();
    struct slu_adapter_choice choice = {sla, 1};
    drop_cache(sla);
    must(slu_session_set_adapters(session, &choice, 1, &err), &err);
    double load_s = slu_now_s() - start_s;
    struct slu_engine_stats before, after;
    double with[ROUNDS], without[ROUNDS];
    decode_s(session, n_tokens);
    slu_engine_stats(engine, &before);
    for (int i = 0; i < ROUNDS; i++) {
        must(slu_session_set_adapters(session, &choice, 1, &err), &err);
        with[i] = decode_s(session, n_tokens);
        must(slu_session_set_adapters(session, NULL, 0, &err), &err);
        without[i] = decode_s(session, n_tokens);
    }
    slu_engine_stats(engine, &after);
    double a = median(with, ROUNDS), b = median(without, ROUNDS);
    double mb = 1e-6 * (double)(after.adapter_flash_bytes - before.adapter_flash_bytes);
    printf("streamed   %s, share of %.1f MB; load %.1f ms; decode %.2f ms a token with, %.2f "
           "without: %+.1f %%; %.2f MB of it read a token\n",
           after.n_adapters_streamed ? "yes" : "no", 1e-6 * (double)params.adapter_bytes,
           1e3 * load_s, 1e3 * a, 1e3 * b, 100 * (a / b - 1), mb / ROUNDS / (n_tokens + 3));
    slu_session_destroy(session);
    slu_engine_close(engine);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: adapters MODEL.slu [RANK [TOKENS [experts [PART]]]]\n");
        return 2;
    }
    unsigned rank = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 16;
    uint32_t n_tokens = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 16;
    bool has_experts = argc > 4 && strcmp(argv[4], "experts") == 0;
    uint32_t targets = SLU_ADAPTER_ATTENTION | (has_experts ? SLU_ADAPTER_EXPERTS : 0);
    char dir[] = "./sluice-bench-XXXXXX", sla[2][96];
    struct slu_adapter_info info;
    struct slu_err err = {0};
    if (!mkdtemp(dir)) {
        return 1;
    }
    make_adapter(argv[1], dir, rank, 1, targets, sla[0], sizeof sla[0], &info);
    make_adapter(argv[1], dir, rank, 2, targets, sla[1], sizeof sla[1], &info);
    printf("adapter    rank %u, %u pairs, %u expert blocks, %.1f MB on flash, %.1f MB in memory\n",
           rank, info.n_loras, info.n_blocks, 1e-6 * (double)info.file_bytes,
           1e-6 * (double)info.memory_bytes);

    struct slu_engine_params params = {.ctx = 256, .adapter_bytes = 2 * info.memory_bytes};
    struct slu_engine *engine;
    struct slu_session *session;
    must(slu_engine_open(argv[1], &params, &engine, &err), &err);
    must(slu_session_create(engine, NULL, &session, &err), &err);

    double loads[ROUNDS], flash[ROUNDS], swaps[2 * ROUNDS], with[ROUNDS], without[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        /* A share of one adapter: the other one leaves, so each is loaded anew. */
        struct slu_registry *registry;
        struct slu_base base = slu_lora_base(&engine->weights, engine->pack->fingerprint);
        struct slu_registry_params one = {
            .ledger = engine->ledger, .base = &base, .bytes_max = info.memory_bytes};
        must(slu_registry_create(&one, &registry, &err), &err);
        drop_cache(sla[0]);
        flash[i] = flash_bandwidth(argv[1]);
        const struct slu_adapter *adapter;
        double start_s = slu_now_s();
        must(slu_registry_acquire(registry, sla[0], 0, &adapter, &err), &err);
        loads[i] = slu_now_s() - start_s;
        slu_registry_release(registry, adapter);
        slu_registry_destroy(registry);
    }
    struct slu_adapter_choice choices[2] = {{sla[0], 1}, {sla[1], 1}};
    for (int i = 0; i < 2; i++) {
        must(slu_session_set_adapters(session, &choices[i], 1, &err), &err);
    }
    for (int i = 0; i < 2 * ROUNDS; i++) {
        double start_s = slu_now_s();
        must(slu_session_set_adapters(session, &choices[i % 2], 1, &err), &err);
        swaps[i] = slu_now_s() - start_s;
    }
    decode_s(session, n_tokens); /* fills the cache as far as it goes */
    for (int i = 0; i < ROUNDS; i++) {
        must(slu_session_set_adapters(session, NULL, 0, &err), &err);
        without[i] = decode_s(session, n_tokens);
        must(slu_session_set_adapters(session, choices, 1, &err), &err);
        with[i] = decode_s(session, n_tokens);
    }
    double bandwidth = median(flash, ROUNDS), load_s = median(loads, ROUNDS);
    double bound_s = 1.2 * (double)info.file_bytes / bandwidth + .010;
    double swap_s = median(swaps, 2 * ROUNDS); /* sorts */
    printf("swap       %.1f us (median), %.1f us (most) between resident adapters\n", 1e6 * swap_s,
           1e6 * swaps[2 * ROUNDS - 1]);
    printf(
        "cold load  %.1f ms (median, %.1f to %.1f); flash gives %.2f GB/s, so 1.2 times the file "
        "and 10 ms are %.1f ms\n",
        1e3 * load_s, 1e3 * loads[0], 1e3 * loads[ROUNDS - 1], 1e-9 * bandwidth, 1e3 * bound_s);
    double a = median(with, ROUNDS), b = median(without, ROUNDS);
    printf("decode     %.2f ms a token with, %.2f without: %+.1f %% (%.2f to %.2f, %.2f to %.2f)\n",
           1e3 * a, 1e3 * b, 100 * (a / b - 1), 1e3 * with[0], 1e3 * with[ROUNDS - 1],
           1e3 * without[0], 1e3 * without[ROUNDS - 1]);
    slu_session_destroy(session);
    slu_engine_close(engine);
    if (has_experts) {
        run_streamed(argv[1], sla[0], &info, argc > 5 ? strtod(argv[5], NULL) : .25, n_tokens);
    }
    unlink(sla[0]);
    unlink(sla[1]);
    rmdir(dir);
    return 0;
}
