#include "trace.h"

#include <string.h>

#include "kernels/edgeft_bands.h"
#include "model.h"

/* One per thread, as edgeft_run is reentrant. */
static __thread uint8_t *next;

void edgeft_trace(const uint8_t *codes, uint32_t n_bytes)
{
    memcpy(next, codes, n_bytes);
    next += n_bytes;
}

/* Bytes of the maps of the first stages. */
static uint32_t maps(const edgeft_fused_params *p, int32_t n_stages)
{
    uint32_t n_bytes = 0;
    for (int32_t i = 0; i < n_stages; i++) {
        n_bytes += (uint32_t)(p->stages[i].rows * p->stages[i].row_bytes);
    }
    return n_bytes;
}

void edgeft_trace_rows(const void *block, int32_t stage, int32_t first, int32_t n, const uint8_t *codes)
{
    const edgeft_fused_params *p = block;
    const uint32_t row_bytes = (uint32_t)p->stages[stage].row_bytes;
    memcpy(next + maps(p, stage) + (uint32_t)first * row_bytes, codes, (uint32_t)n * row_bytes);
}

void edgeft_trace_end(const void *block)
{
    const edgeft_fused_params *p = block;
    next += maps(p, p->n_stages);
}

int edgeft_run_traced(const uint8_t *image, int32_t *logits, void *arena, uint32_t arena_bytes, uint8_t *trace)
{
    next = trace;
    return edgeft_run(image, logits, arena, arena_bytes);
}
