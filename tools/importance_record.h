/*
 * Records how much each column of each matrix matters: the second moments of its inputs, while an
 * engine computes. Sums are kept in memory, a float for each column of what was used; they can be
 * saved and loaded, so that a calibration that was interrupted can go on.
 *
 * Matrices that the model keeps in a form of its own (MLA's kv_b) aren't seen and have no entry;
 * nor has the router.
 *
 * Thread safety: created, saved and destroyed by one thread while nothing computes.
 */
#ifndef SLU_TOOLS_IMPORTANCE_RECORD_H
#define SLU_TOOLS_IMPORTANCE_RECORD_H

#include "slu.h"

struct slu_importance_record;

int slu_importance_record_create(struct slu_engine *engine,
                                 struct slu_importance_record **ret_record, struct slu_err *err);
void slu_importance_record_destroy(struct slu_importance_record *record); /* NULL is fine */

/* Writes the importance file (tools/importance.h). SLU_ENOMEM also if a sum couldn't be kept. */
int slu_importance_record_write(const struct slu_importance_record *record, const char *path,
                                struct slu_err *err);

/* The sums so far, after n_prompts of the texts whose checksum is `input`; whole or not at all. */
int slu_importance_record_save(const struct slu_importance_record *record, const char *path,
                               uint64_t input, uint32_t n_prompts, struct slu_err *err);
/* Refuses a file that isn't what was saved; one that is absent is fine. SLU_EIO. */
int slu_importance_record_check(const char *path, struct slu_err *err);
/* After how many prompts they were saved; 0, with nothing loaded, for a file that is absent,
 * damaged, or of other texts or another model. */
uint32_t slu_importance_record_load(struct slu_importance_record *record, const char *path,
                                    uint64_t input);

#endif
