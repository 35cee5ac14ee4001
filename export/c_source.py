"""The C text of a bundle: sizes, calls, constants and golden samples, put into the templates. Kernels are copied, never written here."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft import __version__, kernels
from edgeft.export.c_arena import ALIGNMENT
from edgeft.export.c_bands import params_of
from edgeft.export.c_blocks import FUSED, block_name, block_text
from edgeft.export.c_memory import Memory, scratch_name
from edgeft.export.c_plan import IMAGE, LOGITS, Constant, Params, Plan, Step, c_name
from edgeft.graph import Op, op_inputs
from edgeft.runner import Images

ROW = 24
"""Numbers on one line."""
LARGEST_LIST = 2**14
"""Longer arrays of bytes are written as strings: compilers read them in a tenth of the time and of the memory.

Strings beyond 4095 bytes are more than C99 asks of a compiler (-pedantic warns); so are objects beyond 65535 bytes, which weights are."""
_OCTAL = np.array([f"\\{byte:03o}" for byte in range(256)], "S4")
_HEADERS = (
    "edgeft_fixedpoint.h", "edgeft_kernels.h", "edgeft_status.h", "edgeft_sums.h",
    "edgeft_packed.h", "edgeft_bands.h", "edgeft_vector.h", "edgeft_scalar.h", "edgeft_avx2.h", "edgeft_avx512.h", "edgeft_neon.h",
    "edgeft_dsp.h", "edgeft_dsp_tile.h", "edgeft_dsp_depth.h",
)  # fmt: skip


def bundle_files(plan: Plan, memory: Memory, images: Images, logits: NDArray[np.int64], title: str) -> dict[str, str]:
    """Every file of a bundle by its path; main.c replays `images` [n, channels, rows, columns] and the codes that they must give."""
    (channels, rows, columns), output = plan.graph.tensors[plan.graph.input].shape, plan.graph.tensors[plan.graph.output]
    words: dict[str, Any] = {
        "TITLE": title, "VERSION": __version__, "ROWS": rows, "COLUMNS": columns, "CHANNELS": channels,
        "CLASSES": int(np.prod(output.shape)), "FRAC": output.format.frac, "ARENA": memory.placement.n_bytes, "ALIGNMENT": ALIGNMENT,
        "BANDS": '#include "kernels/edgeft_bands.h"\n' if memory.fused else "",
        "PARAMS": "\n\n".join(_params(plan, memory)), "CALLS": _calls_text(plan, memory),
    }  # fmt: skip
    used = sources(plan, memory)
    return {
        "model.h": template("model.h.in", words),
        "model.c": template("model.c.in", words),
        "weights.h": _weights_header(plan),
        "weights.c": '#include "weights.h"\n' + "".join(_definition(each) for each in plan.constants),
        "golden.h": _golden(images, logits),
        "main.c": template("main.c", {}),
        "Makefile": template("Makefile.in", {"SOURCES": " ".join(used)}),
        "CMakeLists.txt": template("CMakeLists.txt.in", {"SOURCES": "".join(f"  {each}\n" for each in used).rstrip("\n")}),
        **{f"kernels/{name}": (kernels.include_dir() / name).read_text() for name in _HEADERS},
        **{name: kernels.source(name.removeprefix("kernels/")).read_text() for name in used if name.startswith("kernels/")},
    }


def sources(plan: Plan, memory: Memory) -> list[str]:
    """The C files of a bundle but main.c."""
    kernels = {step.kernel for step in plan.steps} | ({FUSED} if memory.fused else set())
    return ["model.c", "weights.c", *(f"kernels/{name}.c" for name in sorted(kernels))]


def template(name: str, words: Mapping[str, Any]) -> str:
    """A file of templates/, with @WORD@ replaced."""
    text = (files("edgeft.export") / "templates" / name).read_text()
    for word, value in words.items():
        text = text.replace(f"@{word}@", str(value))
    return text


def _named(plan: Plan) -> list[tuple[str, Step]]:
    """Each step with the name of its sizes: the tensor's, numbered where it takes several calls."""
    counts: dict[str, int] = {}
    found = []
    for step in plan.steps:
        n = counts[step.layer] = counts.get(step.layer, 0) + 1
        found.append((c_name(plan.graph, step.layer) + (f"_{n}" if n > 1 else ""), step))
    return found


def _params(plan: Plan, memory: Memory) -> list[str]:
    """The sizes of all steps, and of each fused block behind those of its stages."""
    names = _named(plan)
    texts = []
    for index, (name, step) in enumerate(names):
        block = memory.block_of(index)
        params = params_of(step, block.schedule.longest[index - block.first]) if block else step.params
        texts.append(_params_text(name, *params))
        if block and block.last == index:
            texts.append(block_text(plan, memory, block, [name for name, _ in names[block.first : index + 1]]))
    return texts


def _params_text(name: str, struct: str, params: Params) -> str:
    fields = ",\n".join(f"    .{key} = {_value(value)}" for key, value in params.items())
    return f"static const edgeft_{struct}_params {name} = {{\n{fields},\n}};"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f".{key} = {_value(each)}" for key, each in value.items()) + "}"
    return "INT32_MIN" if value == -(2**31) else str(value)


def _calls_text(plan: Plan, memory: Memory) -> str:
    """The calls of each op below a line that says what it does, a look at what it wrote; one call for fused ops, behind all their lines."""
    by_layer: dict[str, list[str]] = {}
    for index, (name, step) in enumerate(_named(plan)):
        block = memory.block_of(index)
        if block is None:
            call = f"edgeft_{step.kernel}({', '.join(_arguments(plan, memory, index, name))})"
        elif block.last == index:
            call = f"edgeft_{FUSED}(&{block_name(name)}, image, a)"
        else:
            continue
        lines = f"    status = {call};\n    if (status != EDGEFT_OK) {{\n        return status;\n    }}"
        by_layer.setdefault(LOGITS if step.writes == LOGITS else step.layer, []).append(lines)
    inside = {stage.writes for block in memory.fused for stage in block.stages}
    text = by_layer.get(plan.graph.input, [])
    for op in plan.graph.ops:
        text += ["", f"    /* {_about(plan, memory, op)} */", *by_layer.get(op.output, [])]
        if op.output not in inside:
            text.append(f"    EDGEFT_TRACE({_pointer(plan, memory, op.output)}, {plan.stored[op.output].n_bytes});")
    return "\n".join([*text, *by_layer.get(LOGITS, [])])


def _arguments(plan: Plan, memory: Memory, index: int, name: str) -> list[str]:
    step = plan.steps[index]
    arguments = [f"&{name}", *(_pointer(plan, memory, each) for each in step.reads), *(each.name for each in step.constants)]
    if step.scratch is not None:
        arguments.append(f"a + {memory.offsets[scratch_name(index)]}" if step.scratch else "0")
    return [*arguments, _pointer(plan, memory, step.writes)]


def _about(plan: Plan, memory: Memory, op: Op) -> str:
    names = ", ".join(op_inputs(op))
    tensor = plan.graph.tensors[op.output]
    how = " (no call: the same bytes)" if op.output in plan.views else " (in place)" if op.output in memory.in_place else ""
    how += " (rows of it at a time)" if memory.homes[op.output] == "rows" else ""
    about = f"{op.output} = {type(op).__name__}({names}): {' x '.join(map(str, tensor.shape))}, {tensor.format}{how}"
    return about.replace("*/", "* /").replace("/*", "/ *")


def _pointer(plan: Plan, memory: Memory, name: str) -> str:
    if name in (IMAGE, LOGITS):
        return "image" if name == IMAGE else "logits"
    home = memory.homes[name]
    if home != "arena":
        return home
    place = f"a + {memory.offsets[name]}"
    return f"(int32_t *)(void *)({place})" if plan.stored[name].storage == "int32_t" else place


def _weights_header(plan: Plan) -> str:
    lines = [f"extern const {each.ctype} {each.name}[{_length(each)}];" for each in plan.constants]
    guard = "#ifndef EDGEFT_WEIGHTS_H\n#define EDGEFT_WEIGHTS_H\n\n#include <stdint.h>\n\n"
    return guard + "\n".join(lines) + "\n\n#endif\n"


def _is_text(constant: Constant) -> bool:
    return constant.ctype in ("int8_t", "uint8_t") and constant.values.size > LARGEST_LIST


def _length(constant: Constant) -> int:
    """Entries; a string has a zero at its end that nothing reads."""
    return constant.values.size + int(_is_text(constant))


def _definition(constant: Constant) -> str:
    head = f"\nconst {constant.ctype} {constant.name}[{_length(constant)}] ="
    if _is_text(constant):
        return f"{head}\n{_string(constant.values)};\n"
    return f"{head} {{\n{_list(constant.values)}\n}};\n"


def _list(values: NDArray[Any]) -> str:
    flat = [_value(each) for each in values.ravel().tolist()]
    return "\n".join("    " + ", ".join(flat[start : start + ROW]) + "," for start in range(0, len(flat), ROW))


def _string(values: NDArray[Any]) -> str:
    escaped = _OCTAL[values.ravel().astype(np.int64) & 255]
    return "\n".join(f'    "{escaped[start : start + ROW].tobytes().decode()}"' for start in range(0, escaped.size, ROW))


def _golden(images: Images, logits: NDArray[np.int64]) -> str:
    """golden.h: bytes in the order in which the model reads them."""
    n, codes = len(images), logits.reshape(len(logits), -1)
    pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).reshape(n, -1)
    shown = "\n".join(f"    {{\n{_list(row)}\n    }}," for row in pixels)
    expected = "\n".join(f"    {{\n{_list(row)}\n    }}," for row in codes)
    return (
        "/* Golden images and the codes of the logits that the interpreter of edgeft gives for them. */\n"
        "#ifndef EDGEFT_GOLDEN_H\n#define EDGEFT_GOLDEN_H\n\n#include <stdint.h>\n\n"
        f"#define GOLDEN_IMAGES {n}\n\n"
        f"static const uint8_t golden_images[GOLDEN_IMAGES][{pixels.shape[1]}] = {{\n{shown}\n}};\n\n"
        f"static const int32_t golden_logits[GOLDEN_IMAGES][{codes.shape[1]}] = {{\n{expected}\n}};\n\n#endif\n"
    )
