/* The tensor types that GGUF files name, after the list in ggml's header; numbers 4, 5, 31 to 33
 * and 36 to 38 have been withdrawn there, but old files may still hold them. */
#include "io/gguf.h"

struct ggml_type {
    const char *name;
    uint16_t weights, bytes; /* of a block; 0 where the size isn't settled */
};

static const struct ggml_type types[] = {
    [0] = {"F32", 1, 4},           [1] = {"F16", 1, 2},           [2] = {"Q4_0", 32, 18},
    [3] = {"Q4_1", 32, 20},        [4] = {"Q4_2", 0, 0},          [5] = {"Q4_3", 0, 0},
    [6] = {"Q5_0", 32, 22},        [7] = {"Q5_1", 32, 24},        [8] = {"Q8_0", 32, 34},
    [9] = {"Q8_1", 32, 36},        [10] = {"Q2_K", 256, 84},      [11] = {"Q3_K", 256, 110},
    [12] = {"Q4_K", 256, 144},     [13] = {"Q5_K", 256, 176},     [14] = {"Q6_K", 256, 210},
    [15] = {"Q8_K", 256, 292},     [16] = {"IQ2_XXS", 256, 66},   [17] = {"IQ2_XS", 256, 74},
    [18] = {"IQ3_XXS", 256, 98},   [19] = {"IQ1_S", 256, 50},     [20] = {"IQ4_NL", 32, 18},
    [21] = {"IQ3_S", 256, 110},    [22] = {"IQ2_S", 256, 82},     [23] = {"IQ4_XS", 256, 136},
    [24] = {"I8", 1, 1},           [25] = {"I16", 1, 2},          [26] = {"I32", 1, 4},
    [27] = {"I64", 1, 8},          [28] = {"F64", 1, 8},          [29] = {"IQ1_M", 256, 56},
    [30] = {"BF16", 1, 2},         [31] = {"Q4_0_4_4", 32, 18},   [32] = {"Q4_0_4_8", 32, 18},
    [33] = {"Q4_0_8_8", 32, 18},   [34] = {"TQ1_0", 256, 54},     [35] = {"TQ2_0", 256, 66},
    [36] = {"IQ4_NL_4_4", 32, 18}, [37] = {"IQ4_NL_4_8", 32, 18}, [38] = {"IQ4_NL_8_8", 32, 18},
    [39] = {"MXFP4", 32, 17},      [40] = {"NVFP4", 64, 36},      [41] = {"Q1_0", 0, 0},
    [42] = {"Q2_0", 0, 0},
};

#define N_TYPES (sizeof types / sizeof types[0])

const char *slu_ggml_type_name(uint32_t type)
{
    return type < N_TYPES ? types[type].name : NULL;
}

bool slu_ggml_type_block(uint32_t type, uint32_t *ret_weights, uint32_t *ret_bytes)
{
    if (type >= N_TYPES || types[type].bytes == 0) {
        return false;
    }
    *ret_weights = types[type].weights;
    *ret_bytes = types[type].bytes;
    return true;
}
