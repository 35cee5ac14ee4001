#include "edgeft_bands.h"

/* Tests on a host define these two, to look at every row of every stage. */
#ifndef EDGEFT_TRACE_ROWS
#define EDGEFT_TRACE_ROWS(p, stage, first, n, codes)
#define EDGEFT_TRACE_END(p)
#endif

/* The layers of a block, some rows of one at a time. The arithmetic is that of the kernels which it calls. */
int edgeft_fused(const edgeft_fused_params *p, const uint8_t *image, uint8_t *arena)
{
    int32_t done[EDGEFT_MOST_STAGES]; /* rows of each stage */
    if (p->n_stages > EDGEFT_MOST_STAGES) {
        return EDGEFT_BAD_SHAPE;
    }
    for (int32_t i = 0; i < p->n_stages; i++) {
        done[i] = 0;
    }
    for (int32_t call = 0; call < p->n_calls; call++) {
        const int32_t k = p->calls[call].stage, n = p->calls[call].n, first = done[k];
        const edgeft_stage *s = &p->stages[k];
        const edgeft_rows own = {arena + s->offset, s->room, s->start};
        edgeft_rows x[2];
        for (int32_t i = 0; i < s->n_operands; i++) {
            const edgeft_operand *o = &s->operands[i];
            const edgeft_stage *from = o->source == EDGEFT_OF_STAGE ? &p->stages[o->at] : 0;
            x[i].codes = o->source == EDGEFT_OF_IMAGE ? image : arena + (from ? from->offset : o->at);
            x[i].room = from ? from->room : 0;
            x[i].start = from ? from->start : 0;
        }
        uint8_t *y = arena + s->offset + edgeft_place(&own, first) * s->row_bytes;
        const int status = s->run(s, x, first, n, arena + p->scratch, y);
        if (status != EDGEFT_OK) {
            return status;
        }
        EDGEFT_TRACE_ROWS(p, k, first, n, y);
        done[k] += n;
    }
    EDGEFT_TRACE_END(p);
    return EDGEFT_OK;
}
