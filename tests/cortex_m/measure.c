/* Replays golden images on a board, then counts: a loop of a known number of instructions, and one run of the model, by kernel.
 *
 * Prints lines of a word and numbers. Counts are ticks of the board's counter.
 */
#include <stdint.h>
#include <stdio.h>

#include "count.h"
#include "golden.h"
#include "model.h"

#define STACK_WORDS 4096
#define UNUSED 0xA5A5A5A5u

static uint32_t memory[(EDGEFT_ARENA_BYTES + EDGEFT_ARENA_ALIGNMENT) / 4 + 1];
static int32_t logits[EDGEFT_CLASSES];
uint32_t count_own[KERNELS];

/* 2 * n instructions, and the call. */
__attribute__((noinline)) static void loop(uint32_t n)
{
    __asm__ volatile("1: subs %0, %0, #1\n\tbne 1b" : "+r"(n) : : "cc");
}

static long count_differing(void *arena)
{
    long differing = 0;
    for (int image = 0; image < GOLDEN_IMAGES; image++) {
        const int status = edgeft_run(golden_images[image], logits, arena, EDGEFT_ARENA_BYTES);
        for (int i = 0; i < EDGEFT_CLASSES; i++) {
            differing += status != EDGEFT_OK || logits[i] != golden_logits[image][i];
        }
    }
    return differing;
}

int main(void)
{
    const uintptr_t past = (uintptr_t)memory % EDGEFT_ARENA_ALIGNMENT;
    void *arena = (uint8_t *)memory + (past ? EDGEFT_ARENA_ALIGNMENT - past : 0);
    printf("differing %ld of %ld\n", count_differing(arena), (long)GOLDEN_IMAGES * EDGEFT_CLASSES);

    uint32_t start = count_now();
    loop(1000000);
    printf("loop %lu\n", (unsigned long)(count_now() - start));

    /* What the run leaves of a pattern below this function's frame is stack that it does not need. */
    uintptr_t here;
    __asm__ volatile("mov %0, sp" : "=r"(here));
    volatile uint32_t *const low = (volatile uint32_t *)here - STACK_WORDS;
    for (int i = 0; i < STACK_WORDS; i++) {
        low[i] = UNUSED;
    }
    for (int i = 0; i < KERNELS; i++) {
        count_own[i] = 0;
    }
    start = count_now();
    edgeft_run(golden_images[0], logits, arena, EDGEFT_ARENA_BYTES);
    const uint32_t spent = count_now() - start;
    int unused = 0;
    while (unused < STACK_WORDS && low[unused] == UNUSED) {
        unused++;
    }
    printf("run %lu\nstack %d of %d\n", (unsigned long)spent, 4 * (STACK_WORDS - unused), 4 * STACK_WORDS);
    for (int i = 0; i < KERNELS; i++) {
        printf("kernel %s %lu\n", count_names[i], (unsigned long)count_own[i]);
    }
    return 0;
}
