#include "trace.h"

#include <string.h>

#include "model.h"

/* One per thread, as edgeft_run is reentrant. */
static __thread uint8_t *next;

void edgeft_trace(const uint8_t *codes, uint32_t n_bytes)
{
    memcpy(next, codes, n_bytes);
    next += n_bytes;
}

int edgeft_run_traced(const uint8_t *image, int32_t *logits, void *arena, uint32_t arena_bytes, uint8_t *trace)
{
    next = trace;
    return edgeft_run(image, logits, arena, arena_bytes);
}
