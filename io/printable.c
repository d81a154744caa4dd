#include "io/printable.h"

#include <string.h>

struct slu_printable slu_printable(const char *at, size_t len)
{
    struct slu_printable printable;
    const size_t room = sizeof printable.text - 1;
    const size_t n = len > room ? room - 3 : len;
    for (size_t i = 0; i < n; i++) {
        printable.text[i] = at[i] >= 0x20 && at[i] < 0x7f ? at[i] : '?';
    }
    printable.text[n] = '\0';
    if (n < len) {
        memcpy(printable.text + n, "...", 4);
    }
    return printable;
}
