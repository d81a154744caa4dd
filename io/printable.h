/*
 * Names from files, made fit for a sentence: a hostile file must not steer a person's terminal.
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_IO_PRINTABLE_H
#define SLU_IO_PRINTABLE_H

#include <stddef.h>

#define SLU_PRINTABLE_BYTES 72

/* Room for one shortened name; handed about by value so that it can stand in an argument list. */
struct slu_printable {
    char text[SLU_PRINTABLE_BYTES];
};

/* The first bytes of a name with everything but printable ASCII turned into '?'; "..." stands for
 * what was cut off. */
struct slu_printable slu_printable(const char *at, size_t len);

#endif
