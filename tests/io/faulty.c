#include "faulty.h"

static int faulty_read_at(struct slu_source *source, uint64_t offset, void *buffer, size_t bytes,
                          struct slu_err *err)
{
    struct faulty *faulty = (struct faulty *)source;
    faulty->n_bytes += bytes;
    if (faulty->n_reads++ == faulty->fail_at) {
        return slu_err_set(err, SLU_EIO, "%s: a fault was played in", source->name);
    }
    return faulty->inner->read_at(faulty->inner, offset, buffer, bytes, err);
}

static void faulty_destroy(struct slu_source *source)
{
    (void)source;
}

void faulty_init(struct faulty *faulty, struct slu_source *inner, int fail_at)
{
    *faulty = (struct faulty){
        .base = {.read_at = faulty_read_at,
                 .destroy = faulty_destroy,
                 .size_bytes = inner->size_bytes,
                 .name = inner->name},
        .inner = inner,
        .fail_at = fail_at,
    };
}
