/* What counts instructions on QEMU's boards, and where the counts of the kernels go. Built with -DCOUNTER=address -DKERNELS=number. */
#ifndef COUNT_H
#define COUNT_H

#include <stdint.h>

/* A register of the board that counts at a fixed frequency. With -icount, QEMU's time passes by instructions: so does this. */
static inline uint32_t count_now(void)
{
    return *(volatile uint32_t *)COUNTER;
}

/* By kernel, without the kernels that it calls. */
extern const char *const count_names[KERNELS];
extern uint32_t count_own[KERNELS];

#endif
