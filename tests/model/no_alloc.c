/*
 * Shows that the token loop allocates nothing: every allocator entry point is counted, on all
 * threads, between the first and the last token of a generation that streams experts through the
 * smallest cache, and those of an adapter too. A program of its own, since it takes malloc's place.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "slu.h"
#include "tools/adapter_import.h"
#include "tools/adapter_synth.h"
#include "tools/packer.h"
#include "tools/synth.h"

static atomic_bool armed;
static atomic_long n_calls;
static atomic_long n_tokens;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void count(void)
{
    if (atomic_load(&armed)) {
        atomic_fetch_add(&n_calls, 1);
    }
}

void *malloc(size_t bytes)
{
    count();
    return NEXT(malloc)(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    count();
    return NEXT(calloc)(n, bytes);
}

void *realloc(void *memory, size_t bytes)
{
    count();
    return NEXT(realloc)(memory, bytes);
}

int posix_memalign(void **ret, size_t align, size_t bytes)
{
    count();
    return NEXT(posix_memalign)(ret, align, bytes);
}

void *aligned_alloc(size_t align, size_t bytes)
{
    count();
    return NEXT(aligned_alloc)(align, bytes);
}

void *mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset)
{
    count();
    return NEXT(mmap)(at, bytes, prot, flags, fd, offset);
}

void *mallocx(size_t bytes, int flags);
void *mallocx(size_t bytes, int flags)
{
    count();
    void *(*next)(size_t, int) = (void *(*)(size_t, int))dlsym(RTLD_NEXT, "mallocx");
    return next(bytes, flags);
}

static int on_text(void *arg, const char *text, size_t len, int32_t token)
{
    (void)arg;
    (void)text;
    (void)len;
    (void)token;
    /* Armed by the first token, so what the first prefill warms up isn't counted. */
    atomic_store(&armed, true);
    atomic_fetch_add(&n_tokens, 1);
    return 0;
}

static int run(const char *slu, const char *sla, enum slu_io io)
{
    struct slu_engine *engine;
    struct slu_session *session;
    struct slu_err err;
    struct slu_engine_params params = {
        .ram_bytes = 1ull << 30, .ctx = 256, .n_threads = 2, .io = io, .minimum_cache = true};
    params.adapter_bytes = 9ull << 20; /* of which it gets half */
    if (slu_engine_open(slu, &params, &engine, &err) < 0 ||
        slu_session_create(engine, NULL, &session, &err) < 0 ||
        slu_session_set_adapters(session, &(struct slu_adapter_choice){sla, 1}, 1, &err) < 0 ||
        slu_session_text(session, "Once upon a time", 16, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    struct slu_generate_params generate = {
        .n_max = 80, .ignore_end = true, .sampling = {.temperature = 1, .seed = 3}};
    generate.text = on_text;
    int rc = slu_session_generate(session, &generate, NULL, &err);
    atomic_store(&armed, false);
    struct slu_engine_stats stats;
    slu_engine_stats(engine, &stats);
    printf("%s: %ld tokens, %llu blocks read, %llu bytes of %u streamed adapters, %ld "
           "allocations\n",
           stats.io_backend, atomic_load(&n_tokens), (unsigned long long)stats.misses,
           (unsigned long long)stats.adapter_flash_bytes, stats.n_adapters_streamed,
           atomic_load(&n_calls));
    slu_session_destroy(session);
    slu_engine_close(engine);
    bool is_fine = rc == 0 && atomic_load(&n_calls) == 0 && atomic_load(&n_tokens) > 50 &&
                   stats.misses > 100 && stats.n_adapters_streamed == 1;
    atomic_store(&n_tokens, 0);
    return is_fine ? 0 : 1;
}

int main(void)
{
    char dir[] = "/tmp/sluice-no-alloc-XXXXXX", gguf[64], slu[64], lora[64], sla[64];
    if (!mkdtemp(dir)) {
        return 1;
    }
    snprintf(gguf, sizeof gguf, "%s/m.gguf", dir);
    snprintf(slu, sizeof slu, "%s/m.slu", dir);
    snprintf(lora, sizeof lora, "%s/a.gguf", dir);
    snprintf(sla, sizeof sla, "%s/a.sla", dir);
    struct slu_synth_params model = {.arch = SLU_ARCH_QWEN3MOE, .n_experts = 64, .n_used = 4};
    struct slu_packer_params pack = {
        .in = gguf, .out = slu, .codec = SLU_CODEC_ZSTD, .block_bytes = 8192};
    struct slu_packer_report report;
    struct slu_err err = {0};
    struct slu_adapter_synth_params synth = {
        .base = gguf, .rank = 60, .targets = SLU_ADAPTER_EXPERTS};
    struct slu_adapter_import_params import = {.in = lora, .out = sla};
    struct slu_adapter_info info;
    int rc = slu_synth_write(gguf, &model, &err) < 0 || slu_packer_run(&pack, &report, &err) < 0 ||
             slu_adapter_synth_write(lora, &synth, &err) < 0 ||
             slu_adapter_import(&import, &info, &err) < 0;
    if (rc) {
        fprintf(stderr, "%s\n", err.text);
    }
    rc = rc || run(slu, sla, SLU_USE_IO_AUTO) || run(slu, sla, SLU_USE_IO_PREAD);
    unlink(lora);
    unlink(sla);
    unlink(gguf);
    unlink(slu);
    rmdir(dir);
    return rc;
}
