/* Host only: every tensor of a run, one behind the other. Compile the bundle with -include trace.h, and trace.c. */
#ifndef EDGEFT_TRACE_H
#define EDGEFT_TRACE_H

#include <stdint.h>

#define EDGEFT_TRACE(codes, n_bytes) edgeft_trace((const uint8_t *)(codes), (n_bytes))

void edgeft_trace(const uint8_t *codes, uint32_t n_bytes);

/* edgeft_run, with the codes of every tensor, as the kernels store them, to `trace`. */
int edgeft_run_traced(const uint8_t *image, int32_t *logits, void *arena, uint32_t arena_bytes, uint8_t *trace);

#endif
