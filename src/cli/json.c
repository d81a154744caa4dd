#include "cli/cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Bytes of the UTF-8 sequence at text, or 0 if there is no valid one. */
static size_t sequence_bytes(const unsigned char *text, size_t len)
{
    static const struct {
        unsigned char mask, lead;
        uint32_t min;
    } forms[] = {{0x80, 0x00, 0}, {0xe0, 0xc0, 0x80}, {0xf0, 0xe0, 0x800}, {0xf8, 0xf0, 0x10000}};
    for (size_t n = 0; n < 4; n++) {
        if ((text[0] & forms[n].mask) != forms[n].lead) {
            continue;
        }
        uint32_t point = text[0] & (unsigned char)~forms[n].mask;
        if (n + 1 > len) {
            return 0;
        }
        for (size_t i = 1; i <= n; i++) {
            if ((text[i] & 0xc0) != 0x80) {
                return 0;
            }
            point = point << 6 | (text[i] & 0x3f);
        }
        bool is_valid = point >= forms[n].min && point <= 0x10ffff && (point >> 11) != 0x1b;
        return is_valid ? n + 1 : 0;
    }
    return 0;
}

void slu_json_text(json_t *object, const char *key, const char *text, size_t len)
{
    json_t *value = json_stringn(text, len);
    char *mended = value ? NULL : malloc(3 * len + 1);
    if (mended) {
        size_t n = 0;
        for (size_t i = 0; i < len;) {
            size_t bytes = sequence_bytes((const unsigned char *)text + i, len - i);
            memcpy(mended + n, bytes ? text + i : "\xef\xbf\xbd", bytes ? bytes : 3);
            n += bytes ? bytes : 3;
            i += bytes ? bytes : 1;
        }
        value = json_stringn(mended, n);
        free(mended);
    }
    json_object_set_new(object, key, value ? value : json_null());
}

void slu_json_real(json_t *object, const char *key, double value)
{
    json_object_set_new(object, key, isfinite(value) ? json_real(value) : json_null());
}

void slu_json_whole(json_t *object, const char *key, uint64_t value)
{
    json_object_set_new(object, key, json_integer((json_int_t)value));
}

void slu_json_bool(json_t *object, const char *key, bool value)
{
    json_object_set_new(object, key, json_boolean(value));
}

int slu_json_print(json_t *object, struct slu_err *err)
{
    /* Failures of stdout itself are found, once for all, when the program ends. */
    char *text = json_dumps(object, JSON_REAL_PRECISION(9));
    json_decref(object);
    if (!text) {
        return slu_err_set(err, SLU_ENOMEM, "no memory to write JSON");
    }
    puts(text);
    free(text);
    return 0;
}
