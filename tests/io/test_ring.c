#include <criterion/criterion.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "io/ring.h"

#define PAGE       SLU_IO_ALIGN
#define N_PAGES    700u
#define TAIL_BYTES 1000u /* of a last page that isn't whole */

/* So many calls of liburing's fail before one reaches it. */
static unsigned n_refusals;

int io_uring_submit(void *uring);
int io_uring_submit(void *uring)
{
    if (n_refusals > 0) {
        n_refusals--;
        return -EAGAIN;
    }
    int (*next)(void *uring);
    *(void **)&next = dlsym(RTLD_NEXT, "io_uring_submit");
    return next(uring);
}

struct fixture {
    char path[64];
    unsigned char *memory; /* to read into: N_PAGES pages */
    struct slu_io_range range;
    struct slu_ring_params params;
};

static unsigned char byte_at(uint64_t offset)
{
    return (unsigned char)((offset * 2654435761u) >> 13);
}

static uint64_t xorshift(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void fixture_init(struct fixture *f)
{
    snprintf(f->path, sizeof f->path, "/tmp/slu-test-ring-XXXXXX");
    int fd = mkstemp(f->path);
    cr_assert_geq(fd, 0);
    size_t bytes = (size_t)N_PAGES * PAGE + TAIL_BYTES;
    unsigned char *content = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) {
        content[i] = byte_at(i);
    }
    cr_assert_eq(write(fd, content, bytes), (ssize_t)bytes);
    free(content);
    close(fd);
    f->memory = mmap(NULL, (size_t)N_PAGES * PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq(f->memory, (unsigned char *)MAP_FAILED);
    f->range = (struct slu_io_range){.start = f->memory, .bytes = (size_t)N_PAGES * PAGE};
}

static void fixture_finish(struct fixture *f)
{
    munmap(f->memory, (size_t)N_PAGES * PAGE);
    unlink(f->path);
}

/* Runs the body on either back end, with direct and with buffered reads, with registered buffers
 * and without. */
static void on_each_ring(unsigned depth, void (*body)(struct fixture *f, struct slu_ring *ring))
{
    struct fixture f;
    fixture_init(&f);
    for (unsigned i = 0; i < 8; i++) {
        f.params = (struct slu_ring_params){
            .backend = i & 1 ? SLU_IO_PREAD : SLU_IO_URING,
            .depth = depth,
            .ranges = &f.range,
            .n_ranges = i & 2 ? 1 : 0,
            .is_buffered = i & 4,
        };
        struct slu_ring *ring;
        struct slu_err err;
        int e = slu_ring_open(f.path, &f.params, &ring, &err);
        if (e == SLU_EUNSUP && f.params.backend == SLU_IO_URING) {
            fprintf(stderr, "skipped on io_uring: %s\n", err.text);
            continue;
        }
        cr_assert_eq(e, 0, "%s", err.text);
        cr_assert_str_eq(ring->backend, i & 1 ? "pread" : "io_uring");
        cr_assert(!(f.params.is_buffered && ring->is_direct));
        cr_assert(!(f.params.n_ranges == 0 && ring->is_registered));
        memset(f.memory, 0, f.range.bytes);
        body(&f, ring);
        slu_ring_destroy(ring);
    }
    fixture_finish(&f);
}

static void assert_content(const unsigned char *memory, uint64_t offset, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        cr_assert_eq(memory[i], byte_at(offset + i), "offset %llu",
                     (unsigned long long)(offset + i));
    }
}

static void read_at_random(struct fixture *f, struct slu_ring *ring)
{
    enum { DEPTH = 16, N_READS = 400, READ_PAGES = 8 };
    uint64_t offsets[DEPTH];
    uint32_t bytes[DEPTH];
    bool is_busy[DEPTH] = {false};
    unsigned n_in_flight = 0, n_submitted = 0, n_completed = 0;
    uint64_t random = 4101842887655102017u;
    struct slu_err err;
    while (n_completed < N_READS) {
        for (unsigned i = 0; i < DEPTH && n_submitted < N_READS; i++) {
            if (is_busy[i]) {
                continue;
            }
            bytes[i] = (uint32_t)(1 + xorshift(&random) % READ_PAGES) * PAGE;
            offsets[i] = xorshift(&random) % (N_PAGES - READ_PAGES) * PAGE;
            struct slu_read read = {.buffer = f->memory + i * READ_PAGES * PAGE,
                                    .offset = offsets[i],
                                    .bytes = bytes[i],
                                    .tag = i,
                                    .is_fresh = n_submitted % 3 == 0};
            cr_assert_eq(ring->submit(ring, &read, &err), 0, "%s", err.text);
            is_busy[i] = true;
            n_submitted++;
            n_in_flight++;
        }
        struct slu_read_done done[5];
        int n = ring->wait(ring, done, 5, true);
        cr_assert(n > 0 && n <= 5);
        for (int d = 0; d < n; d++) {
            uint64_t i = done[d].tag;
            cr_assert_eq(done[d].result, 0);
            cr_assert(is_busy[i]);
            assert_content(f->memory + i * READ_PAGES * PAGE, offsets[i], bytes[i]);
            is_busy[i] = false;
            n_completed++;
            n_in_flight--;
        }
    }
    cr_assert_eq(n_in_flight, 0);
    struct slu_read_done done;
    cr_assert_eq(ring->wait(ring, &done, 1, true), 0);
}

/* Reads of random places and sizes, many in flight, come back complete, once each, with the
 * file's bytes. */
Test(ring, reads_at_random)
{
    on_each_ring(16, read_at_random);
}

static void read_past_end(struct fixture *f, struct slu_ring *ring)
{
    const uint64_t offsets[] = {
        (uint64_t)(N_PAGES - 1) * PAGE, /* ends in the last, partial page */
        (uint64_t)N_PAGES * PAGE,       /* lies in it */
        (uint64_t)(N_PAGES + 1) * PAGE, /* past it */
        (uint64_t)1 << 40,
    };
    struct slu_read_done done;
    struct slu_err err;
    for (unsigned i = 0; i < 4; i++) {
        struct slu_read read = {
            .buffer = f->memory, .offset = offsets[i], .bytes = 2 * PAGE, .tag = 77 + i};
        cr_assert_eq(ring->submit(ring, &read, &err), 0, "%s", err.text);
        cr_assert_eq(ring->wait(ring, &done, 1, true), 1);
        cr_assert_eq(done.tag, 77 + i);
        cr_assert_eq(done.result, SLU_EIO);
    }
    struct slu_read read = {.buffer = f->memory, .offset = 0, .bytes = PAGE, .tag = 5};
    cr_assert_eq(ring->submit(ring, &read, &err), 0);
    cr_assert_eq(ring->wait(ring, &done, 1, true), 1);
    cr_assert_eq(done.result, 0);
    assert_content(f->memory, 0, PAGE);
}

/* A read that reaches past the end of the file is an error and spoils nothing after it. */
Test(ring, ends_with_the_file)
{
    on_each_ring(4, read_past_end);
}

static void overfill(struct fixture *f, struct slu_ring *ring)
{
    struct slu_err err;
    struct slu_read read = {.buffer = f->memory, .bytes = PAGE};
    for (unsigned i = 0; i < 3; i++) {
        read.tag = i;
        read.buffer = f->memory + i * PAGE;
        cr_assert_eq(ring->submit(ring, &read, &err), 0);
    }
    cr_assert_eq(ring->submit(ring, &read, &err), SLU_EINVAL);
    cr_assert_not_null(strstr(err.text, "3 reads"), "%s", err.text);
    struct slu_read_done done[3];
    unsigned seen = 0;
    for (unsigned n = 0; n < 3;) {
        int got = ring->wait(ring, done, 3, true);
        cr_assert_gt(got, 0);
        for (int d = 0; d < got; d++) {
            seen |= 1u << done[d].tag;
        }
        n += (unsigned)got;
    }
    cr_assert_eq(seen, 7);
    cr_assert_eq(ring->wait(ring, done, 3, true), 0);
    cr_assert_eq(ring->submit(ring, &read, &err), 0);
}

/* One read more than the depth is refused and not taken; with completions taken there is room
 * again. A ring may be destroyed with a read in flight. */
Test(ring, holds_its_depth)
{
    on_each_ring(3, overfill);
}

static void submit_unaligned(struct fixture *f, struct slu_ring *ring)
{
    const struct slu_read reads[] = {
        {.buffer = f->memory + 512, .offset = 0, .bytes = PAGE},
        {.buffer = f->memory, .offset = 512, .bytes = PAGE},
        {.buffer = f->memory, .offset = 0, .bytes = 512},
        {.buffer = f->memory, .offset = 0, .bytes = 0},
        {.buffer = f->memory, .offset = 0, .bytes = 0x80000000u},
        {.buffer = f->memory, .offset = UINT64_MAX - PAGE + 1, .bytes = PAGE},
    };
    struct slu_err err;
    for (size_t i = 0; i < sizeof reads / sizeof reads[0]; i++) {
        cr_assert_eq(ring->submit(ring, &reads[i], &err), SLU_EINVAL);
    }
    struct slu_read_done done;
    cr_assert_eq(ring->wait(ring, &done, 1, true), 0);
    cr_assert_eq(ring->wait(ring, &done, 1, false), 0);
}

/* Reads that aren't in whole pages are refused before the system sees them. */
Test(ring, refuses_unaligned)
{
    on_each_ring(4, submit_unaligned);
}

static void wait_without_blocking(struct fixture *f, struct slu_ring *ring)
{
    struct slu_err err;
    struct slu_read read = {.buffer = f->memory, .offset = 3 * PAGE, .bytes = 2 * PAGE, .tag = 9};
    cr_assert_eq(ring->submit(ring, &read, &err), 0);
    struct slu_read_done done;
    int n;
    while ((n = ring->wait(ring, &done, 1, false)) == 0) {
        usleep(100);
    }
    cr_assert_eq(n, 1);
    cr_assert_eq(done.tag, 9);
    assert_content(f->memory, 3 * PAGE, 2 * PAGE);
}

/* A completion can be polled for. */
Test(ring, polls)
{
    on_each_ring(4, wait_without_blocking);
}

struct submitter {
    struct slu_ring *ring;
    struct fixture *f;
    unsigned first, n;
    pthread_t id;
};

static void *submit_many(void *arg)
{
    struct submitter *s = arg;
    for (unsigned i = s->first; i < s->first + s->n; i++) {
        struct slu_read read = {.buffer = s->f->memory + i * PAGE,
                                .offset = (uint64_t)i * PAGE,
                                .bytes = PAGE,
                                .tag = i};
        while (s->ring->submit(s->ring, &read, NULL) < 0) {
            usleep(50); /* full: the other thread is taking completions */
        }
    }
    return NULL;
}

static void submit_and_wait_apart(struct fixture *f, struct slu_ring *ring)
{
    enum { N = 600 };
    struct submitter submitters[2] = {
        {.ring = ring, .f = f, .first = 0, .n = N / 2},
        {.ring = ring, .f = f, .first = N / 2, .n = N / 2},
    };
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(pthread_create(&submitters[i].id, NULL, submit_many, &submitters[i]), 0);
    }
    static unsigned char seen[N];
    memset(seen, 0, sizeof seen);
    for (unsigned n = 0; n < N;) {
        struct slu_read_done done[8];
        int got = ring->wait(ring, done, 8, true);
        cr_assert_geq(got, 0);
        for (int d = 0; d < got; d++) {
            cr_assert_eq(done[d].result, 0);
            cr_assert_eq(seen[done[d].tag]++, 0);
        }
        n += (unsigned)got;
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(submitters[i].id, NULL);
    }
    assert_content(f->memory, 0, (size_t)N * PAGE);
}

/* Two threads submit while a third waits. */
Test(ring, serves_many_threads)
{
    on_each_ring(8, submit_and_wait_apart);
}

static void *submit_and_end(void *arg)
{
    struct submitter *s = arg;
    for (unsigned i = s->first; i < s->first + s->n; i++) {
        struct slu_read read = {.buffer = s->f->memory + (size_t)i * 20 * PAGE,
                                .offset = (uint64_t)i * 20 * PAGE,
                                .bytes = 20 * PAGE,
                                .tag = i,
                                .is_fresh = i % 2 == 1};
        cr_assert_eq(s->ring->submit(s->ring, &read, NULL), 0);
    }
    return NULL;
}

static void outlive_submitter(struct fixture *f, struct slu_ring *ring)
{
    int fd = open(f->path, O_RDONLY);
    cr_assert_geq(fd, 0);
    cr_assert_eq(fsync(fd), 0);
    for (int round = 0; round < 10; round++) {
        /* Reads that wait, if buffered, but where files are in memory only. */
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        memset(f->memory, 0, f->range.bytes);
        struct submitter submitter = {.ring = ring, .f = f, .n = 32};
        cr_assert_eq(pthread_create(&submitter.id, NULL, submit_and_end, &submitter), 0);
        pthread_join(submitter.id, NULL);
        struct slu_read_done done;
        for (int i = 0; i < 32; i++) {
            cr_assert_eq(ring->wait(ring, &done, 1, true), 1);
            cr_assert_eq(done.result, 0, "read %llu", (unsigned long long)done.tag);
        }
        assert_content(f->memory, 0, (size_t)32 * 20 * PAGE);
    }
    close(fd);
}

/* Reads survive the thread that submitted them. */
Test(ring, outlives_threads)
{
    on_each_ring(32, outlive_submitter);
}

/* In a process that may start no thread: 0 if all reads come back, 77 without io_uring. */
static int read_fresh_alone(struct fixture *f)
{
    enum { N = 8 };
    struct slu_ring_params params = {.backend = SLU_IO_URING, .depth = N};
    struct slu_ring *ring;
    int e = slu_ring_open(f->path, &params, &ring, NULL);
    if (e < 0) {
        return e == SLU_EUNSUP ? 77 : 1;
    }
    if (geteuid() == 0 && setuid(65534) != 0) {
        return 2; /* for root there is no limit */
    }
    if (setrlimit(RLIMIT_NPROC, &(struct rlimit){0, 0}) != 0) {
        return 3;
    }
    for (unsigned i = 0; i < N; i++) {
        struct slu_read read = {.buffer = f->memory + (size_t)i * 20 * PAGE,
                                .offset = (uint64_t)i * 20 * PAGE,
                                .bytes = 20 * PAGE,
                                .tag = i,
                                .is_fresh = true};
        if (ring->submit(ring, &read, NULL) < 0) {
            return 4;
        }
    }
    for (unsigned i = 0; i < N; i++) {
        struct slu_read_done done;
        if (ring->wait(ring, &done, 1, true) != 1 || done.result != 0) {
            return 5;
        }
    }
    for (size_t i = 0; i < (size_t)N * 20 * PAGE; i++) {
        if (f->memory[i] != byte_at(i)) {
            return 6;
        }
    }
    slu_ring_destroy(ring);
    return 0;
}

/* Memory that was never used is read into even where the system starts no thread to provide it. */
Test(ring, needs_no_threads)
{
    struct fixture f;
    fixture_init(&f);
    pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        _exit(read_fresh_alone(&f));
    }
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) {
        fprintf(stderr, "skipped: no io_uring here\n");
    } else {
        cr_expect_eq(WEXITSTATUS(status), 0, "failed at %d", WEXITSTATUS(status));
    }
    fixture_finish(&f);
}

static void be_refused(struct fixture *f, struct slu_ring *ring)
{
    bool is_uring = strcmp(ring->backend, "io_uring") == 0;
    for (unsigned i = 0; i < 12; i++) {
        struct slu_read read = {
            .buffer = f->memory, .offset = (uint64_t)i * PAGE, .bytes = PAGE, .tag = i};
        n_refusals = is_uring && i < 6 ? 1000 : 0;
        struct slu_err err;
        int e = ring->submit(ring, &read, &err);
        n_refusals = 0;
        cr_assert_eq(e, is_uring && i < 6 ? SLU_EIO : 0, "read %u", i);
        struct slu_read_done done;
        cr_assert_eq(ring->wait(ring, &done, 1, true), e == 0);
        if (e == 0) {
            cr_assert_eq(done.tag, i);
            cr_assert_eq(done.result, 0);
            assert_content(f->memory, read.offset, PAGE);
        }
    }
}

/* A kernel that takes nothing for a while is no reason to read nothing ever after. */
Test(ring, recovers)
{
    on_each_ring(2, be_refused);
}

/* A file that isn't there, and one that can't be read, are errors with the path in the sentence. */
Test(ring, names_what_it_cannot_open)
{
    struct slu_ring_params params = {.backend = SLU_IO_PREAD};
    struct slu_ring *ring = NULL;
    struct slu_err err;
    cr_assert_eq(slu_ring_open("/nonexistent/pack.slu", &params, &ring, &err), SLU_ENOENT);
    cr_assert_not_null(strstr(err.text, "/nonexistent/pack.slu"), "%s", err.text);
    cr_assert_eq(slu_ring_open("/", &params, &ring, &err), SLU_EIO);
    cr_assert_null(ring);
}

/* Without a back end asked for, some back end opens, and its memory was foretold. */
Test(ring, picks_a_backend)
{
    struct fixture f;
    fixture_init(&f);
    struct slu_ring_params params = {.backend = SLU_IO_AUTO};
    cr_assert_gt(slu_ring_bytes(&params), 64 * sizeof(struct slu_read));
    struct slu_ring *ring;
    struct slu_err err;
    cr_assert_eq(slu_ring_open(f.path, &params, &ring, &err), 0, "%s", err.text);
    submit_unaligned(&f, ring);
    slu_ring_destroy(ring);
    slu_ring_destroy(NULL);
    fixture_finish(&f);
}

/* A file system that refuses O_DIRECT is read through the page cache, and reads that the system
 * does only a page at a time are resumed until they are whole. */
Test(ring, falls_back_and_resumes)
{
    enum { BYTES = 16 * PAGE };
    static const char path[] = "/proc/kallsyms"; /* large, made up as it is read */
    static unsigned char expected[BYTES];
    FILE *file = fopen(path, "rb");
    size_t n = file ? fread(expected, 1, BYTES, file) : 0;
    if (file) {
        fclose(file);
    }
    if (n < BYTES) {
        fprintf(stderr, "skipped: %s isn't there\n", path);
        cr_skip_test("no file to read in parts");
    }
    unsigned char *memory = aligned_alloc(PAGE, BYTES);
    for (unsigned i = 0; i < 2; i++) {
        struct slu_ring_params params = {.backend = i ? SLU_IO_PREAD : SLU_IO_URING};
        struct slu_ring *ring;
        struct slu_err err;
        int e = slu_ring_open(path, &params, &ring, &err);
        if (e == SLU_EUNSUP) {
            fprintf(stderr, "skipped on io_uring: %s\n", err.text);
            continue;
        }
        cr_assert_eq(e, 0, "%s", err.text);
        cr_assert_not(ring->is_direct);
        memset(memory, 0, BYTES);
        struct slu_read read = {.buffer = memory, .offset = 0, .bytes = BYTES};
        cr_assert_eq(ring->submit(ring, &read, &err), 0, "%s", err.text);
        struct slu_read_done done;
        cr_assert_eq(ring->wait(ring, &done, 1, true), 1);
        cr_assert_eq(done.result, 0);
        cr_assert_eq(memcmp(memory, expected, BYTES), 0);
        slu_ring_destroy(ring);
    }
    free(memory);
}
