"""Registers that a product in flight still reads, and that machine code overwrites: found in a disassembly.

A ``wgmma`` of Hopper's (``HGMMA`` and its kin in machine code) runs by itself. Until a wait says that it is done it
reads its first operand, where that is in registers, and its sums. Nothing in the processor guards these registers: the
instruction sets no scoreboard, so that ptxas alone has to keep other writes away until the wait, and that of CUDA 12.8
to 13.2 does not always. Neither an interpreter of Triton nor one of PTX sees that.

The model, which errs towards a hazard:

* ``gsb0`` on a product ends a group, of it and of the products before it that have none: ``wgmma.commit_group``.
* ``WARPGROUP.DEPBAR.LE gsb0, N`` waits until at most the N youngest groups run: ``wgmma.wait_group N``. What is not in
  a group that ended is not waited for. ``WARPGROUP.ARRIVE`` (``wgmma.fence``) waits for nothing.
* Where paths meet, a register is read by the youngest product that any of them left. A branch goes both ways, a
  return to behind every call, an indirect branch to every label.
* A predicated write may happen, a predicated wait may not; a predicated end of a group makes no group older.
* A product may write the sums of products in flight, for products run in order; nothing else may.
* An instruction that is not known writes its first register, or the one behind its predicates.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PRODUCT = re.compile(r"[A-Z]GMMA\.64x(\d+)x\d+\.(\w+)")
"""A product of a warpgroup: 64 rows by so many columns, and the type of its sums."""
WAIT = "WARPGROUP.DEPBAR.LE"
A_REGISTERS = 4
"""Registers a thread that hold the first operand: 64 rows by 32 bytes over 128 threads."""
OPEN = -1
"""The age of a product whose group has not ended; else how many groups ended after its own."""

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_FUNCTION = re.compile(r"^\s*(?:\.section\s+\.text\.([^\s,]+)|Function : (\S+))")
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_REGISTER = re.compile(r"^R(\d+)(?:\.\w+)*$")
_PREDICATE = re.compile(r"^!?U?P(?:\d+|T)$")
_TARGET = re.compile(r"`\(([^)]+)\)|\b(0x[0-9a-f]+)\b")
_GROUPS = re.compile(r"^gsb0,\s*(0x[0-9a-f]+|\d+)$")

_WRITES_NOTHING = re.compile(
    r"ST|STG|STS|STL|STSM|STAS|RED|REDG|REDAS|BRA|BRX|BRXU|JMP|JMX|JMXU|CALL|RET|EXIT|KILL|BSSY|BSYNC|BREAK|NANOSLEEP"
    r"|WARPSYNC|BAR|\w*SETP2?|PLOP3|FCHK|R2P|R2UR|R2B|CCTL\w*|PREXIT|ACQBULK|U\w+"
)
"""Opcodes whose registers are all read. Opcodes of the uniform pipe begin with U, and write uniform registers."""
_NO_WAY_ON = frozenset({"BRA", "JMP", "EXIT", "KILL", "RET", "BRX", "BRXU", "JMX", "JMXU"})
_INDIRECT = frozenset({"BRX", "BRXU", "JMX", "JMXU"})
_NEVER = (1 << 30, 0)


@dataclass(frozen=True)
class Instruction:
    """One of a listing.

    Attributes:
        address: in its function.
        opcode: with its modifiers.
        operands: after it.
        predicated: whether it may be passed over.
        text: of the line.
    """

    address: int
    opcode: str
    operands: tuple[str, ...]
    predicated: bool
    text: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


@dataclass
class Function:
    """A kernel's instructions, and the addresses of its labels."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Hazard:
    """A write to a register that an unfinished product reads.

    Attributes:
        register: as ``R156``.
        write: the instruction that writes it.
        product: the one that still reads it.
    """

    register: str
    write: str
    product: str

    def __str__(self) -> str:
        return f"{self.write} overwrites {self.register}, which is still read by {self.product}"


@dataclass(frozen=True)
class Findings:
    """What the machine code of a kernel says of its asynchronous products.

    Attributes:
        kernel: its name.
        products: how many there are.
        register_a: how many take their first operand from registers.
        serialised: whether each is waited for at once, so that nothing runs beside it: right, and slow. ptxas does this
            where it cannot keep other uses of a product's registers away, and warns of it (C7510, C7515).
        hazards: the writes that race with them, in order.
    """

    kernel: str
    products: int
    register_a: int
    serialised: bool
    hazards: tuple[Hazard, ...]

    @property
    def verdict(self) -> str:
        """In a word or two, for a table."""
        if self.hazards:
            return f"{len(self.hazards)} hazards" if len(self.hazards) > 1 else "1 hazard"
        if self.products == 0:
            return ""
        return "serialised" if self.serialised else "none"


def check(listing: str) -> list[Findings]:
    """Look at every kernel of a listing of ``nvdisasm -c`` or ``cuobjdump -sass``.

    Raises:
        ValueError: the listing holds no instruction, or one that cannot be judged.
    """
    functions = [function for function in parse(listing) if function.instructions]
    if not functions:
        raise ValueError("a disassembly without instructions")
    return [_judge(function) for function in functions]


def parse(listing: str) -> Iterator[Function]:
    """The functions of a listing."""
    function, waiting = Function(""), list[str]()
    for line in listing.splitlines():
        if begins := _FUNCTION.match(line):
            yield function
            function, waiting = Function(begins[1] or begins[2]), []
        elif found := _INSTRUCTION.match(line):
            address, negated, predicate, opcode, operands = found.groups()
            if (negated, predicate) == ("!", "PT"):  # It never happens.
                continue
            function.labels.update(dict.fromkeys(waiting, int(address, 16)))
            waiting = []
            parts = tuple(part.strip() for part in operands.split(",")) if operands else ()
            text = f"{opcode} {operands}".strip() + f" at {address}"
            guarded = predicate is not None and (negated, predicate) not in (("", "PT"), ("", "UPT"))
            function.instructions.append(Instruction(int(address, 16), opcode, parts, guarded, text))
        elif label := _LABEL.match(line):
            waiting.append(label[1])
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            raise ValueError(f"not understood in a disassembly: {line.strip()}")
    yield function


def written(instruction: Instruction) -> range:
    """The registers that an instruction may write; of a product its sums."""
    if product := PRODUCT.match(instruction.opcode):
        columns, sums = int(product[1]), product[2]
        first = _number(instruction.operands[0])
        if first is None:
            return range(0)
        return range(first, first + (columns // 4 if sums == "F16" else columns // 2))
    if _WRITES_NOTHING.fullmatch(instruction.name):
        return range(0)
    operands = iter(instruction.operands)
    first = next((_number(operand) for operand in operands if not _PREDICATE.match(operand)), None)
    return range(0) if first is None else range(first, first + _width(instruction))


def _width(instruction: Instruction) -> int:
    """How many registers an instruction writes."""
    name, *modifiers = instruction.opcode.split(".")
    if name in ("HMMA", "IMMA", "QMMA", "BMMA", "OMMA"):
        return 4
    if name == "DMMA":
        return 8
    if name == "CS2R":
        return 1 if "32" in modifiers else 2
    if name == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if name.startswith("D") or "WIDE" in modifiers:
        return 2
    if name in (
        "F2F",
        "F2I",
        "I2F",
        "I2I",
        "FRND",
    ):  # The other type may be the one of 64 bits: that errs towards more.
        return 2 if any(modifier in ("F64", "U64", "S64") for modifier in modifiers) else 1
    return max((int(each) // 32 for each in modifiers if each in ("64", "128", "256")), default=1)


def _number(operand: str) -> int | None:
    found = _REGISTER.match(operand)
    return int(found[1]) if found else None


def _first_operand(instruction: Instruction) -> range:
    """The registers that hold a product's first operand; none where it is in shared memory."""
    if len(instruction.operands) < 3:
        raise ValueError(f"not understood: {instruction.text}")
    first = _number(instruction.operands[1])
    if first is None and "gdesc" not in instruction.operands[1]:
        raise ValueError(f"not understood: {instruction.text}")
    return range(0) if first is None else range(first, first + A_REGISTERS)


# Where an instruction leads.


def _successors(function: Function) -> list[list[int]]:
    """The instructions that may come after each, by their places."""
    code = function.instructions
    places = _Places(code)
    reconvergence: dict[str, list[int]] = {}
    behind_calls = [place + 1 for place, instruction in enumerate(code[:-1]) if instruction.name == "CALL"]
    labelled = sorted({places.of(address) for address in function.labels.values()})
    for instruction in code:
        if instruction.name == "BSSY":
            target = _target(instruction, function, places)
            reconvergence.setdefault(instruction.operands[0], []).append(target)
    found = []
    for place, instruction in enumerate(code):
        name, after = instruction.name, [place + 1] if place + 1 < len(code) else []
        always = not instruction.predicated and (len(instruction.operands) <= 1 or name not in ("BRA", "JMP"))
        if always and name in _NO_WAY_ON:
            after = []
        if name in _INDIRECT:
            after += labelled
        elif name == "RET":
            after += behind_calls
        elif name in ("BRA", "JMP", "CALL"):
            after.append(_target(instruction, function, places))
        elif name in ("BSYNC", "BREAK"):
            after += reconvergence.get(instruction.operands[-1], [])
        found.append(after)
    return found


class _Places:
    """Where in the code an address is: what never happens was left out, so that it may lie between two."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.addresses = [instruction.address for instruction in code]

    def of(self, address: int) -> int:
        """The first instruction from there on."""
        return min(bisect.bisect_left(self.addresses, address), len(self.addresses) - 1)


def _target(instruction: Instruction, function: Function, places: _Places) -> int:
    found = _TARGET.search(instruction.operands[-1]) if instruction.operands else None
    if found is None or (found[1] and found[1] not in function.labels):
        raise ValueError(f"a branch to nowhere: {instruction.text}")
    return places.of(function.labels[found[1]] if found[1] else int(found[2], 16))


# What runs at each instruction.

State = dict[int, tuple[int, int]]
"""For each register that a product in flight reads: its age, and the product's place."""


def _after(state: State, instruction: Instruction, place: int) -> State:
    """What is in flight behind a product or a wait."""
    if instruction.opcode == WAIT:
        if instruction.predicated:
            return state
        left = _GROUPS.match(", ".join(instruction.operands))
        if left is None:
            raise ValueError(f"not understood: {instruction.text}")
        most = int(left[1], 0)
        return {register: value for register, value in state.items() if value[0] < most}
    following = state | dict.fromkeys((*_first_operand(instruction), *written(instruction)), (OPEN, place))
    if "gsb0" not in instruction.operands:
        return following
    older = 0 if instruction.predicated else 1
    return {register: (0 if age == OPEN else age + older, at) for register, (age, at) in following.items()}


def _in_flight(code: Sequence[Instruction], successors: Sequence[Sequence[int]]) -> list[State]:
    """What may be in flight before each instruction: the least solution over all paths."""
    changes = [bool(PRODUCT.match(instruction.opcode)) or instruction.opcode == WAIT for instruction in code]
    states: list[State] = [{} for _ in code]
    pending = [place for place, product in enumerate(changes) if product]
    while pending:
        place = pending.pop()
        following = _after(states[place], code[place], place) if changes[place] else states[place]
        for successor in successors[place]:
            state = states[successor]
            younger = {register: value for register, value in following.items() if value < state.get(register, _NEVER)}
            if younger:
                states[successor] = state | younger
                pending.append(successor)
    return states


def _judge(function: Function) -> Findings:
    code = function.instructions
    unknown = [one.text for one in code if "GMMA" in one.name and not PRODUCT.match(one.opcode)]
    if unknown:
        raise ValueError(f"not understood: {unknown[0]}")
    products = [instruction for instruction in code if PRODUCT.match(instruction.opcode)]
    if not products:
        return Findings(function.name, 0, 0, False, ())
    successors = _successors(function)
    register_a = sum(len(_first_operand(product)) > 0 for product in products)
    hazards = tuple(_hazards(code, _in_flight(code, successors)))
    return Findings(function.name, len(products), register_a, _is_serialised(code, successors), hazards)


def _hazards(code: Sequence[Instruction], states: Sequence[State]) -> Iterator[Hazard]:
    for instruction, state in zip(code, states, strict=True):
        if not state:
            continue
        for register in written(instruction):
            if register in state:
                product = code[state[register][1]]
                if not PRODUCT.match(instruction.opcode) or register not in written(product):
                    yield Hazard(f"R{register}", instruction.text, product.text)
                    break  # One a write is enough to know.


def _is_serialised(code: Sequence[Instruction], successors: Sequence[Sequence[int]]) -> bool:
    """Whether every product is waited for before the next one starts."""
    for place, instruction in enumerate(code):
        if not PRODUCT.match(instruction.opcode):
            continue
        if "gsb0" not in instruction.operands:
            return False
        seen, pending = set[int](), list(successors[place])
        while pending:
            following = pending.pop()
            if following in seen:
                continue
            seen.add(following)
            other = code[following]
            if PRODUCT.match(other.opcode):
                return False
            if other.opcode == WAIT and other.operands[-1] in ("0x0", "0"):
                continue
            pending += successors[following]
    return True
