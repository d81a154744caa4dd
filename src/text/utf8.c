#include "text/text_internal.h"

/* The range of the second byte, which is what rules out overlong forms, surrogates and code
 * points beyond U+10FFFF. Returns the sequence's length, 0 for a byte that can't lead. */
static unsigned lead(unsigned char byte, unsigned char *ret_lo, unsigned char *ret_hi)
{
    *ret_lo = 0x80;
    *ret_hi = 0xbf;
    if (byte < 0x80) {
        return 1;
    }
    if (byte < 0xc2) {
        return 0;
    }
    if (byte < 0xe0) {
        return 2;
    }
    if (byte < 0xf0) {
        if (byte == 0xe0) {
            *ret_lo = 0xa0;
        } else if (byte == 0xed) {
            *ret_hi = 0x9f;
        }
        return 3;
    }
    if (byte < 0xf5) {
        if (byte == 0xf0) {
            *ret_lo = 0x90;
        } else if (byte == 0xf4) {
            *ret_hi = 0x8f;
        }
        return 4;
    }
    return 0;
}

/* How many of the first len bytes belong to one sequence, well-formed as far as they go. */
static unsigned prefix(const unsigned char *text, size_t len, unsigned *ret_whole)
{
    unsigned char lo, hi;
    *ret_whole = len > 0 ? lead(text[0], &lo, &hi) : 0;
    unsigned n = *ret_whole > 0 ? 1 : 0;
    while (n > 0 && n < *ret_whole && n < len) {
        if (text[n] < lo || text[n] > hi) {
            break;
        }
        lo = 0x80;
        hi = 0xbf;
        n++;
    }
    return n;
}

unsigned slu_utf8_len(const unsigned char *text, size_t len)
{
    unsigned whole;
    unsigned n = prefix(text, len, &whole);
    return n == whole ? n : 0;
}

bool slu_utf8_is_start(const unsigned char *text, size_t len)
{
    unsigned whole;
    unsigned n = prefix(text, len, &whole);
    return n == len && n < whole;
}
