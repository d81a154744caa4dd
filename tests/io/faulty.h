/*
 * A source that passes reads on to another and fails one of them, as a bad disk does.
 */
#ifndef SLU_TESTS_IO_FAULTY_H
#define SLU_TESTS_IO_FAULTY_H

#include "io/source.h"

struct faulty {
    struct slu_source base;
    struct slu_source *inner; /* the caller's */
    int fail_at;              /* number of the read that fails, -1: none */
    int n_reads;
    uint64_t n_bytes; /* asked for in all */
};

/* Lives where the caller put it; destroy does nothing. */
void faulty_init(struct faulty *faulty, struct slu_source *inner, int fail_at);

#endif
