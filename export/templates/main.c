/* Replays golden images through the model and counts the codes that differ: what this board computes is what was exported, or it is not.
 *
 * Runs on a host and, with newlib's semihosting, on a bare device. Exit status 0: no code differs.
 */
#include <stdint.h>
#include <stdio.h>

#include "golden.h"
#include "model.h"

/* C99 has no word for alignment, so there is room to start at a multiple. 32-bit words, as some tensors are read as int32. */
static uint32_t memory[(EDGEFT_ARENA_BYTES + EDGEFT_ARENA_ALIGNMENT) / 4 + 1];

int main(void)
{
    const uintptr_t past = (uintptr_t)memory % EDGEFT_ARENA_ALIGNMENT;
    void *arena = (uint8_t *)memory + (past ? EDGEFT_ARENA_ALIGNMENT - past : 0);
    long differing = 0;
    for (int image = 0; image < GOLDEN_IMAGES; image++) {
        int32_t logits[EDGEFT_CLASSES];
        const int status = edgeft_run(golden_images[image], logits, arena, EDGEFT_ARENA_BYTES);
        if (status != EDGEFT_OK) {
            printf("image %d: edgeft_run returned status %d\n", image, status);
            return 2;
        }
        for (int i = 0; i < EDGEFT_CLASSES; i++) {
            differing += logits[i] != golden_logits[image][i];
        }
    }
    printf("%d images, %ld of %ld codes differ\n", GOLDEN_IMAGES, differing, (long)GOLDEN_IMAGES * EDGEFT_CLASSES);
    return differing != 0;
}
