#include "tools/codec_choice.h"

#include <math.h>

#define IN_FLIGHT_BYTES (4.0 * 1048576)     /* what the stream reads at once */
#define SHARES          64u                 /* that are looked at */
#define WORTH_MIXING    0.03                /* the estimate is no better than that */
#define GOLDEN          0.61803398874989485 /* multiples of which spread best over 0 to 1 */

static double per(double rate)
{
    return rate > 0 ? 1 / rate : 0;
}

/* Seconds a byte with a share of x of the blocks compressed. Reads and decoding overlap, but not
 * entirely where either takes about as long as the other: blocks come in bursts, and what may be
 * in flight is bounded. The cube's root lies between the longer of both and their sum; with it, a
 * pack for which both take the same time is a quarter slower than either alone, as measured. */
static double time_of(const struct slu_codec_costs *costs, double x)
{
    double unpack = x * per(costs->unpack_bytes_s);
    double flash = (1 - x * (1 - costs->ratio)) * per(costs->flash_bytes_s);
    double cpu = (unpack + per(costs->multiply_bytes_s)) / costs->cores;
    double last = fmin(1, IN_FLIGHT_BYTES / fmax(1, costs->layer_bytes));
    return cbrt(flash * flash * flash + cpu * cpu * cpu) + last * unpack / costs->cores;
}

struct slu_codec_choice slu_codec_choose(const struct slu_codec_costs *costs)
{
    struct slu_codec_choice choice = {
        .reason = SLU_CODEC_NO_GAIN,
        .raw_s = time_of(costs, 0),
        .zstd_s = time_of(costs, 1),
    };
    choice.chosen_s = choice.raw_s;
    if (!(costs->ratio < 1)) {
        return choice;
    }
    choice.reason = SLU_CODEC_CPU;
    if (choice.zstd_s < choice.chosen_s) {
        choice.reason = SLU_CODEC_FLASH;
        choice.share = 1;
        choice.chosen_s = choice.zstd_s;
    }
    double share = 0, time = choice.chosen_s * (1 - WORTH_MIXING);
    for (unsigned i = 1; i < SHARES; i++) {
        double x = (double)i / SHARES, t = time_of(costs, x);
        if (t < time) {
            share = x;
            time = t;
        }
    }
    if (share > 0) {
        choice = (struct slu_codec_choice){.share = share,
                                           .reason = SLU_CODEC_BALANCE,
                                           .chosen_s = time,
                                           .raw_s = choice.raw_s,
                                           .zstd_s = choice.zstd_s};
    }
    return choice;
}

bool slu_codec_takes(double share, uint32_t layer, uint64_t i)
{
    if (share <= 0 || share >= 1) {
        return share > 0;
    }
    double whole, phase = modf(layer * GOLDEN, &whole);
    return floor(phase + (double)(i + 1) * share) > floor(phase + (double)i * share);
}

const char *slu_codec_reason_text(enum slu_codec_reason reason)
{
    static const char *const texts[] = {
        [SLU_CODEC_NO_GAIN] = "compression saves nothing on these blocks",
        [SLU_CODEC_CPU] = "flash is fast enough, so that decoding would cost more than it saves",
        [SLU_CODEC_BALANCE] = "more of them would keep the processor busier than they save flash",
        [SLU_CODEC_FLASH] = "flash is slow enough, so that every byte less is worth its decoding",
    };
    return texts[reason];
}
