/*
 * Errors. Functions that can fail return 0 or a positive count on success and a negative
 * `enum slu_error` otherwise. Those that deal with files, users or budgets also take a nullable
 * `struct slu_err *`, which receives one sentence for a person: what is wrong, where, and what
 * would mend it. The library never prints.
 *
 * Thread safety: a `struct slu_err` belongs to its caller; nothing here has state.
 */
#ifndef SLU_BASE_ERR_H
#define SLU_BASE_ERR_H

#ifdef __cplusplus
extern "C" {
#endif

enum slu_error {
    SLU_OK = 0,
    SLU_EINVAL = -1,  /* an argument or option that makes no sense */
    SLU_EIO = -2,     /* the system refused to read or write, or a file is shorter than it says */
    SLU_EFORMAT = -3, /* bytes from a file break their format, or a checksum doesn't match */
    SLU_EUNSUP = -4,  /* well-formed, but of a type, version or architecture not supported */
    SLU_ENOMEM = -5,  /* the system has no memory to give */
    SLU_EBUDGET = -6, /* the ledger's limit would be passed; the message names what would do */
    SLU_ECANCEL = -7, /* the caller asked to stop */
    SLU_ENOENT = -8,  /* no such file, key or tensor */
    SLU_ERANGE = -9,  /* more tokens than the context, or an id outside its table */
};

/* One sentence, no newline, always NUL-terminated; empty when there was no error. */
struct slu_err {
    int code;
    char text[480];
};

/* Writes code and sentence into `err` unless it is NULL. Returns code, so that callers can
 * `return slu_err_set(...)`. */
int slu_err_set(struct slu_err *err, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "prefix: " before the sentence that is there, and keeps the code. */
void slu_err_prefix(struct slu_err *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* A few words for a code, for callers that passed no `struct slu_err`. Static storage. */
const char *slu_strerror(int code);

#ifdef __cplusplus
}
#endif

#endif
