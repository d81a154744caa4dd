#include "tools/codec_choice.h"

#include <math.h>

#define IN_FLIGHT_BYTES (4.0 * 1048576)     /* what the stream reads at once */
#define GOLDEN          0.61803398874989485 /* multiples of which spread best over 0 to 1 */

static double per(double rate)
{
    return rate > 0 ? 1 / rate : 0;
}

/* Seconds a byte with a share of x of the blocks compressed. */
static double time_of(const struct slu_codec_costs *costs, double x)
{
    double unpack = x * per(costs->unpack_bytes_s);
    double flash = (1 - x * (1 - costs->ratio)) * per(costs->flash_bytes_s);
    double cpu = (unpack + per(costs->multiply_bytes_s)) / costs->cores;
    double last = fmin(1, IN_FLIGHT_BYTES / fmax(1, costs->layer_bytes));
    return fmax(flash, cpu) + last * unpack / costs->cores;
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
    /* The time is made of two straight lines, so its least is at an end or where they meet. */
    double flash = per(costs->flash_bytes_s), falls = (1 - costs->ratio) * flash;
    double rises = per(costs->unpack_bytes_s) / costs->cores;
    double meet = (flash - per(costs->multiply_bytes_s) / costs->cores) / (falls + rises);
    choice.reason = SLU_CODEC_CPU;
    if (meet > 0 && meet < 1 && time_of(costs, meet) < choice.chosen_s) {
        choice.reason = SLU_CODEC_BALANCE;
        choice.share = meet;
        choice.chosen_s = time_of(costs, meet);
    }
    if (choice.zstd_s < choice.chosen_s) {
        choice.reason = SLU_CODEC_FLASH;
        choice.share = 1;
        choice.chosen_s = choice.zstd_s;
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
        [SLU_CODEC_BALANCE] = "as many as make flash and processor finish together",
        [SLU_CODEC_FLASH] = "flash is the slower even with all of them compressed",
    };
    return texts[reason];
}
