"""PTX text parsed: kernels, their declarations, and instructions with operands. Section numbers are the PTX ISA's."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace

SIZES = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)} | {"pred": 1, "b128": 16}
_LINE_DIRECTIVE = re.compile(r"^\s*\.(version|target|address_size|file|loc)\b.*$", re.M)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SECTION = re.compile(r"^\s*\.section\b[^{]*\{[^}]*\}", re.M)


class PTXError(Exception):
    """The text is not PTX that is understood; the message names its line."""


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; coordinates are those of a tensor copy, ``[base, {x, y}]``."""

    base: str
    offset: int
    coordinates: tuple[str, ...] = ()


Operand = str | tuple[str, ...] | Address
"""A register, symbol, label or number as it is written; the names within ``{a, b}`` or ``a|b``; or an address."""


@dataclass(frozen=True)
class Variable:
    """A parameter, or a variable of one of the memories."""

    space: str
    type: str
    name: str
    size: int
    align: int
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction; the target is the index of the one that a branch goes to."""

    line: int
    text: str
    guard: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    target: int = -1


@dataclass
class Kernel:
    """An entry: its registers by name (values are types), variables, and code."""

    name: str
    parameters: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)


@dataclass
class Module:
    """The kernels by name, and the variables that they share."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


@dataclass
class _Scope:
    """What the block ``{ ... }`` declares, and the one around it; names of registers are made unique."""

    around: _Scope | None
    number: int
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def register(self, name: str) -> str:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.around
        return name

    def label(self, name: str) -> int | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.around
        return None


@functools.lru_cache(maxsize=16)
def parse(text: str) -> Module:
    """Parse a module."""
    module = Module()
    kernel: Kernel | None = None
    scope = _Scope(None, 0)
    scopes = 0
    branches: list[tuple[int, _Scope]] = []
    for line, kind, statement in _statements(text):
        if kind == "open":
            if ".entry" in statement:
                kernel = _entry(statement, line)
                module.kernels[kernel.name] = kernel
            elif statement:
                raise PTXError(f"line {line}: functions are not supported: {statement!r}")
            scopes += 1
            scope = _Scope(scope, scopes)
        elif kind == "close":
            if scope.around is None:
                raise PTXError(f"line {line}: a brace too many")
            scope = scope.around
            if scope.around is None and kernel is not None:
                for index, where in branches:
                    branch = kernel.code[index]
                    target = where.label(str(branch.operands[0]))
                    if target is None:
                        raise PTXError(f"line {branch.line}: no label {branch.operands[0]!r}")
                    kernel.code[index] = replace(branch, target=target)
                kernel, branches = None, []
        elif kind == "label":
            assert kernel is not None
            scope.labels[statement] = len(kernel.code)
        elif statement.startswith(".reg"):
            assert kernel is not None
            _declare(statement, line, scope, kernel)
        elif statement.startswith(".") and not statement.startswith((".pragma", ".maxntid", ".reqntid")):
            (module if kernel is None else kernel).variables.append(_variable(statement, line))
        elif not statement.startswith("."):
            assert kernel is not None
            instruction = _instruction(statement, line, scope)
            if instruction.opcode == "bra":
                branches.append((len(kernel.code), scope))
            kernel.code.append(instruction)
    return module


def _statements(text: str) -> list[tuple[int, str, str]]:
    """(line, kind, text) of each statement, label, and brace of a block; an opening brace comes with what precedes."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    for pattern in (_COMMENT, _SECTION, _LINE_DIRECTIVE):
        text = pattern.sub(blank, text)
    found: list[tuple[int, str, str]] = []
    pending, line, start, depth = "", 1, 1, 0
    for token in re.findall(r"\n|[{};]|[^\n{};]+", text):
        if token == "\n":
            line += 1
            pending += " "
            continue
        if not pending.strip():
            start = line
        while match := re.match(r"\s*([\w$%.]+)\s*:(?!:)", token) if not pending.strip() else None:
            found.append((line, "label", match[1]))
            token = token[match.end() :]
        if token == ";" and not depth:
            found.append((start, "statement", pending.strip()))
            pending = ""
        elif token == "{" and not depth and (not pending.strip() or re.search(r"\.(entry|func)\b", pending)):
            found.append((start, "open", pending.strip()))
            pending = ""
        elif token == "}" and not depth:
            found.append((line, "close", ""))
            pending = ""
        else:
            depth += (token == "{") - (token == "}")
            pending += token
    return [entry for entry in found if entry[1] != "statement" or entry[2]]


def _entry(statement: str, line: int) -> Kernel:
    match = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?", statement)
    if match is None:
        raise PTXError(f"line {line}: not an entry: {statement!r}")
    if any(
        int(count) != 1 for count in re.findall(r"\d+", "".join(re.findall(r"nctapercluster([\d\s,]+)", statement)))
    ):
        raise PTXError(f"line {line}: clusters of several CTAs are not supported")
    return Kernel(match[1], [_variable(text.strip(), line) for text in (match[2] or "").split(",") if text.strip()])


def _variable(statement: str, line: int) -> Variable:
    """5.2 - 5.4: ``.param .u64 .ptr .global .align 1 name``, ``.shared .align 4 .b8 name[16]``, with initial values."""
    declaration, _, values = statement.partition("=")
    space = re.search(r"\.(param|shared|global|const|local)\b", declaration)
    kind = re.search(r"\.([busf]\d+|pred)\b", declaration)
    name = re.search(r"([\w$%]+)\s*((?:\[\s*\d*\s*\]\s*)*)$", declaration.strip())
    if space is None or kind is None or name is None:
        raise PTXError(f"line {line}: not a declaration: {statement!r}")
    align = re.search(r"\.align\s+(\d+)", declaration)
    size = SIZES[kind[1]]
    for length in re.findall(r"\[\s*(\d*)\s*\]", name[2]):
        size *= int(length or 0)
    pointer = ".ptr" in declaration  # Its alignment is that of what it points to.
    return Variable(
        space[1],
        kind[1],
        name[1],
        size,
        int(align[1]) if align and not pointer else SIZES[kind[1]],
        tuple(int(value, 0) for value in re.findall(r"-?\w+", values)),
    )


def _declare(statement: str, line: int, scope: _Scope, kernel: Kernel) -> None:
    """5.4: ``.reg .b32 %r<54>;`` and ``.reg .pred p, q;``."""
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
    if match is None or match[1] not in SIZES:
        raise PTXError(f"line {line}: not a declaration of registers: {statement!r}")
    for name in re.split(r"\s*,\s*", match[2]):
        several = re.match(r"(.*)<(\d+)>", name)
        for one in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]:
            unique = one if one not in kernel.registers else f"{one}@{scope.number}"
            scope.registers[one] = unique
            kernel.registers[unique] = match[1]


def _instruction(statement: str, line: int, scope: _Scope) -> Instruction:
    match = re.match(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
    if match is None:
        raise PTXError(f"line {line}: not an instruction: {statement!r}")
    guard = match[1] + scope.register(match[2]) if match[2] else ""
    opcode, *modifiers = match[3].split(".")
    texts = re.findall(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,\[\]{}])+)", match[4]) if match[4].strip() else []
    operands = tuple(_operand(text.strip(), line, scope) for text in texts)
    return Instruction(line, " ".join(statement.split()), guard, opcode, tuple(modifiers), operands)


def _operand(text: str, line: int, scope: _Scope) -> Operand:
    if text.startswith("["):
        match = re.match(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+)\s*)?(?:,\s*\{([^}]*)\}\s*)?\]$", text)
        if match is None:
            raise PTXError(f"line {line}: not an address: {text!r}")
        coordinates = tuple(scope.register(name.strip()) for name in match[3].split(",")) if match[3] else ()
        return Address(scope.register(match[1]), int(match[2] or "0", 0), coordinates)
    if text.startswith("{"):
        return tuple(scope.register(name.strip()) for name in text.strip("{}").split(","))
    if "|" in text:
        return tuple(scope.register(name.strip()) for name in text.split("|"))
    if text.startswith("!"):
        return "!" + scope.register(text[1:].strip())
    return scope.register(text)
