"""The collectives of a compiled program, read from its HLO text (`compiled.as_text()`) of CPU or TPU."""

import dataclasses
import math
import re

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations|called_computations)"
    r"=\{?(%[\w.-]+(?:, %[\w.-]+)*)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands, the bracket behind them, attributes
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])


_Computations = dict[str, list[_Instruction]]


def collectives(hlo: str) -> dict[str, int]:
    """Bytes of the arrays that a program's collectives work on, by kind, on one device.  Kinds that do not occur are left out.

    An operation counts its whole array, not the bytes that the algorithm (a ring, say) sends over each link:

    * all-reduce: the sum that every device ends up with;
    * all-gather: the gathered array that every device ends up with;
    * reduce-scatter: the array that is summed, before it is split among the devices;
    * all-to-all, collective-permute and the others: what a device receives.

    An operation counts once, whether it is one instruction, a pair of start and done, or split into the many fusions that a
    TPU overlaps with other work.  In the body of a loop it counts once per iteration if the text gives the trip count: as a
    number, or as a condition that compares a counter with a constant (loops count from zero).  Otherwise it counts once, as
    do all branches of a conditional.

    Raises:
      ValueError: the text is not HLO.
    """
    computations, entry = _read(hlo)
    if entry is None:
        raise ValueError("not HLO text: there is no ENTRY computation")
    found = dict.fromkeys(KINDS, 0)
    pieces: set[str] = set()

    def walk(name: str, times: int) -> None:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-done")
            if kind in found and not _piece_of_known(instruction, pieces):
                found[kind] += times * _bytes(instruction, computations[name])
            if instruction.opcode in ("async-update", "async-done"):  # counted at async-start
                continue
            again = times * (_trips(instruction, computations) if instruction.opcode == "while" else 1)
            for called in _CALLED.findall(instruction.rest):
                for callee in called.split(", "):
                    walk(callee[1:], again)

    walk(entry, 1)
    return {kind: count for kind, count in found.items() if count}


def _read(hlo: str) -> tuple[_Computations, str | None]:
    """The instructions of every computation, and the name of the entry computation."""
    computations: _Computations = {}
    entry, current = None, ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(_Instruction(match[2], match[3], match[4], match[5], bool(match[1])))
    return computations, entry


def _piece_of_known(instruction: _Instruction, pieces: set[str]) -> bool:
    """Whether this repeats an operation that a TPU spreads over several fusions; each of them shows the whole operation."""
    if "async_collective_fusion_config" not in instruction.rest:
        return False
    channel = re.search(r"channel_id=\d+", instruction.rest)
    key = f"{instruction.opcode} {channel[0] if channel else instruction.name}"
    known = key in pieces
    pieces.add(key)
    return known


def _bytes(instruction: _Instruction, computation: list[_Instruction]) -> int:
    if instruction.opcode != "reduce-scatter":
        return _size(instruction.type)
    types = {other.name: other.type for other in computation}
    return sum(_size(types[operand]) for operand in instruction.operands)


def _size(type_: str) -> int:
    """Bytes of an array or a tuple of arrays such as `(f32[8,16]{1,0}, bf16[4]{0})`."""
    bits = (int(bits or 8) * math.prod(map(int, shape.split(",") if shape else ())) for _, bits, shape in _ARRAY.findall(type_))
    return sum(-(-count // 8) for count in bits)


def _trips(loop: _Instruction, computations: _Computations) -> int:
    """The trip count of a loop; 1 where it is unknown."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(stated[1])
    condition = re.search(r"condition=%([\w.-]+)", loop.rest)
    instructions = computations.get(condition[1], []) if condition else []
    constants = {
        instruction.name: int(value[1])
        for instruction in instructions
        if instruction.opcode == "constant" and (value := re.match(r"(\d+)\)", instruction.rest))
    }
    root = next((instruction for instruction in instructions if instruction.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return 1
    return constants.get(root.operands[-1], 1)
