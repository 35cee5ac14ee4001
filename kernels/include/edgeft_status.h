/* What the kernels and a model's run function return. */
#ifndef EDGEFT_STATUS_H
#define EDGEFT_STATUS_H

#define EDGEFT_OK 0
/* A pointer is null. */
#define EDGEFT_NULL 1
/* The arena does not start at a multiple of EDGEFT_ARENA_ALIGNMENT. */
#define EDGEFT_ARENA_MISALIGNED 2
/* The arena has fewer bytes than EDGEFT_ARENA_BYTES. */
#define EDGEFT_ARENA_TOO_SMALL 3
/* A kernel was given sizes that do not fit each other: the bundle was changed by hand. */
#define EDGEFT_BAD_SHAPE 4

#endif
