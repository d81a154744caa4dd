/* Any bytes as a stored extent under a right checksum, decoded into exactly as many bytes as are
 * promised. The first three bytes of the input say how many, and by which codec. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define HEAD_BYTES 3u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < HEAD_BYTES) {
        return 0;
    }
    /* Up to 1 MiB, so that several zstd blocks fit. */
    size_t raw_bytes = ((size_t)data[0] | (size_t)data[1] << 8 | (size_t)(data[2] & 15) << 16) + 1;
    enum slu_codec_id codec = data[2] & 0x80 ? SLU_CODEC_RAW : SLU_CODEC_ZSTD;
    const size_t stored_bytes = size - HEAD_BYTES;
    uint8_t *stored = malloc(stored_bytes + 1), *out = malloc(raw_bytes);
    struct slu_decoder *decoder;
    struct slu_err err = {0};
    if (stored && out && slu_decoder_create(&decoder, &err) == 0) {
        memcpy(stored, data + HEAD_BYTES, stored_bytes);
        int rc = slu_decode(decoder, codec, stored, stored_bytes,
                            slu_checksum(stored, stored_bytes), out, raw_bytes, &err);
        if (rc != 0 && (rc != SLU_EFORMAT || err.text[0] == '\0')) {
            abort();
        }
        slu_decoder_destroy(decoder);
    }
    free(stored);
    free(out);
    return 0;
}
