/* Host only: every tensor of a run, one behind the other. Compile the bundle with -include trace.h, and trace.c. */
#ifndef EDGEFT_TRACE_H
#define EDGEFT_TRACE_H

#include <stdint.h>

#define EDGEFT_TRACE(codes, n_bytes) edgeft_trace((const uint8_t *)(codes), (n_bytes))

/* Rows first ... first + n - 1 of a stage of a fused block (kernels/edgeft_bands.h), which may never be in memory all at once; then, its end. */
#define EDGEFT_TRACE_ROWS(p, stage, first, n, codes) edgeft_trace_rows((p), (stage), (first), (n), (codes))
#define EDGEFT_TRACE_END(p) edgeft_trace_end(p)

void edgeft_trace(const uint8_t *codes, uint32_t n_bytes);

void edgeft_trace_rows(const void *block, int32_t stage, int32_t first, int32_t n, const uint8_t *codes);

void edgeft_trace_end(const void *block);

/* edgeft_run, with the codes of every tensor, as the kernels store them, to `trace`. */
int edgeft_run_traced(const uint8_t *image, int32_t *logits, void *arena, uint32_t arena_bytes, uint8_t *trace);

#endif
