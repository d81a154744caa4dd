/* Answers one question: cc hello.c $(pkg-config --cflags --libs sluice) -o hello */
#include <slu.h>
#include <stdio.h>
#include <string.h>

static int print(void *arg, const char *text, size_t len, int32_t token)
{
    (void)arg, (void)token;
    return fwrite(text, 1, len, stdout) < len || fflush(stdout) != 0;
}

int main(int argc, char **argv)
{
    struct slu_engine *engine = NULL;
    struct slu_session *session = NULL;
    struct slu_result result;
    struct slu_err err = {0};
    const char *question = argc > 2 ? argv[2] : "What is a sluice?";
    int rc = slu_engine_open(argc > 1 ? argv[1] : "model.slu",
                             &(struct slu_engine_params){.ram_bytes = 4ull << 30}, &engine, &err);
    if (rc == 0 &&
        (rc = slu_session_create(engine, &(struct slu_session_params){0}, &session, &err)) == 0 &&
        (rc = slu_session_chat(session, question, strlen(question), &err)) == 0) {
        rc = slu_session_generate(
            session, &(struct slu_generate_params){.n_max = 200, .text = print}, &result, &err);
    }
    puts("");
    if (rc < 0) {
        fprintf(stderr, "hello: %s\n", err.text);
    }
    slu_session_destroy(session);
    slu_engine_close(engine);
    return rc < 0;
}
