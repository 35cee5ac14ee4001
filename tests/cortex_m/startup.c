/* Just enough to reach newlib's start on QEMU's Cortex-M boards: the vectors. newlib's start then clears .bss, opens the console of the
 * emulator (semihosting) and calls main. A fault spins; the test has a time limit.
 */
#include <stdint.h>

extern uint32_t stack_top;
void _start(void);

static void fault(void)
{
    for (;;) {
    }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &stack_top, (const void *)_start, (const void *)fault, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault,
};
