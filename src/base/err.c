#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int slu_err_set(struct slu_err *err, int code, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        err->code = code;
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
    }
    return code;
}

void slu_err_prefix(struct slu_err *err, const char *format, ...)
{
    if (!err) {
        return;
    }
    struct slu_err old = *err;
    va_list args;
    va_start(args, format);
    int n = vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    if (n < 0 || (size_t)n + 2 >= sizeof err->text) {
        *err = old;
        return;
    }
    size_t room = sizeof err->text - (size_t)n - 3;
    size_t kept = strnlen(old.text, room);
    memcpy(err->text + n, ": ", 2);
    memcpy(err->text + n + 2, old.text, kept);
    err->text[(size_t)n + 2 + kept] = '\0';
}

const char *slu_strerror(int code)
{
    switch (code) {
    case SLU_OK:
        return "no error";
    case SLU_EINVAL:
        return "invalid argument";
    case SLU_EIO:
        return "input or output failed";
    case SLU_EFORMAT:
        return "malformed or corrupt data";
    case SLU_EUNSUP:
        return "not supported";
    case SLU_ENOMEM:
        return "out of memory";
    case SLU_EBUDGET:
        return "over the memory budget";
    case SLU_ECANCEL:
        return "cancelled";
    case SLU_ENOENT:
        return "not found";
    case SLU_ERANGE:
        return "out of range";
    default:
        return "unknown error";
    }
}
