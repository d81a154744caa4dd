#include <criterion/criterion.h>
#include <string.h>
#include <unistd.h>

#include "scratch.h"
#include "tools/claim.h"

/* A claim holds PATH.part as long as it lasts, and leaves nothing that it made. */
Test(claim, makes_and_removes_the_part)
{
    struct scratch scratch;
    struct slu_claim claim;
    struct slu_err err = {0};
    scratch_init(&scratch);
    const char *path = scratch_path(&scratch, "out");
    cr_assert_eq(slu_claim_open(path, &claim, &err), 0, "%s", err.text);
    cr_assert_eq(scratch_count(&scratch), 1);
    cr_assert_eq(access(scratch_path(&scratch, "out.part"), F_OK), 0);
    slu_claim_release(&claim);
    cr_assert_eq(scratch_count(&scratch), 0);
    slu_claim_release(&claim); /* and again */
    scratch_finish(&scratch);
}

/* What lay there before stays, and so does what was written into it. */
Test(claim, keeps_what_others_wrote)
{
    struct scratch scratch;
    struct slu_claim claim;
    scratch_init(&scratch);
    const char *part = scratch_path(&scratch, "out.part");
    const char *other = scratch_path(&scratch, "other.part");
    scratch_write(part, "", 0);
    cr_assert_eq(slu_claim_open(scratch_path(&scratch, "out"), &claim, NULL), 0);
    slu_claim_release(&claim);
    cr_assert_eq(access(part, F_OK), 0);
    cr_assert_eq(slu_claim_open(scratch_path(&scratch, "other"), &claim, NULL), 0);
    scratch_write(other, "x", 1);
    slu_claim_release(&claim);
    cr_assert_eq(access(other, F_OK), 0);
    scratch_finish(&scratch);
}

/* A folder that isn't there, and a folder in the file's place, are told. */
Test(claim, refuses_what_cannot_be_written)
{
    struct scratch scratch;
    struct slu_claim claim;
    struct slu_err err = {0};
    scratch_init(&scratch);
    cr_assert_eq(slu_claim_open(scratch_path(&scratch, "none/out"), &claim, &err), SLU_EIO);
    cr_assert(strstr(err.text, "none/out: cannot be written: No such file"), "%s", err.text);
    cr_assert_eq(slu_claim_open(scratch.folder, &claim, &err), SLU_EIO);
    cr_assert(strstr(err.text, "cannot be written: Is a directory"), "%s", err.text);
    cr_assert_eq(scratch_count(&scratch), 0);
    scratch_finish(&scratch);
}
