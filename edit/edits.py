"""Operations on edits: apply them in order, fold them into the weights, make them smaller, describe and rebuild them.

An edit is data: a dataclass whose fields are the paper's hyper-parameters, with the paper's defaults. There is no
registry: an artifact stores the import path and the fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.facts import check_units
from edit.groups import Group
from edit.inputs import trust
from edit.replaced import drop, gone, within
from edit.state_dicts import check_layout

T = TypeVar("T")


def apply(denoiser: Denoiser, edits: Mapping[str, Edit], fresh: bool = True) -> Denoiser:
    """Apply edits in order, in place.

    Args:
        denoiser: to change
        edits: by name, unique in this denoiser; own parameters are registered as `denoiser.edits[name]`
        fresh: call each edit's `initialise`; False if weights are loaded afterwards

    Raises:
        ValueError: if a name is taken or impossible, or two edits exclude each other, or their order is wrong (both
            are named), or an edit replaces what is not there or what another has changed
    """
    for name, new in edits.items():
        if name in denoiser.applied:
            raise ValueError(f"an edit named {name!r} is already applied; give the second one another name")
        if not name or "." in name or hasattr(denoiser.edits, name):  # torch would refuse it after the surgery
            raise ValueError(f"an edit cannot be named {name!r}: that is part of torch's own names; choose another")
        if not is_dataclass(new):
            raise TypeError(f"{type(new).__name__} is not a dataclass: an edit is data, its fields are stored")
        for other_name, other in denoiser.applied.items():
            if type(other).__name__ in new.excludes or type(new).__name__ in other.excludes:
                raise ValueError(
                    f"{name} ({type(new).__name__}) cannot be applied together with {other_name} "
                    f"({type(other).__name__}): remove one of them"
                )
            if other.last:
                raise ValueError(
                    f"{name} ({type(new).__name__}) cannot be applied after {other_name} ({type(other).__name__}), "
                    "which copies units as they are: put it before"
                )
        if new.name not in ("", name):
            raise ValueError(f"this {type(new).__name__} is applied as {new.name!r} already: make another for {name!r}")
        object.__setattr__(new, "name", name)
        own = new.apply(denoiser)
        if own is not None:
            denoiser.edits[name] = own
        denoiser.applied[name] = new
        denoiser.train(denoiser.training)  # new modules are born in training mode
        if fresh:
            new.initialise(denoiser)
        _drop_replaced(denoiser, name)
    return denoiser


def _drop_replaced(denoiser: Denoiser, name: str) -> None:
    """Take the weights out that an edit replaces.

    Raises:
        ValueError: if there are no such weights in the model, or an edit before this one has changed them
    """
    new = denoiser.applied[name]
    if not (named := new.replaces(denoiser)):
        return
    who = f"{name} ({type(new).__name__})"
    if alien := next((n for n in named if not f"{n}.".startswith("model.")), None):
        raise ValueError(f"{who} replaces {alien}, which is no weight of the model (model. ...): name those alone")
    try:
        found = [n.removeprefix("model.") for n in within(denoiser, named)]
    except ValueError as error:
        raise ValueError(f"{who} cannot replace what is not there: {error}") from error
    layers = {n.rpartition(".")[0] for n in found}
    for key, _ in denoiser.model.named_parameters():
        for other_name, other in denoiser.applied.items():
            if key.rpartition(".")[0] in layers and other is not new and other.stock_key(key) != key:
                raise ValueError(
                    f"{who} replaces {key}, which {other_name} ({type(other).__name__}) has changed: put {name} before "
                    f"it, or fold {other_name} first"
                )
    drop(denoiser.model, found, name)


def chosen(who: str, units: tuple[int, ...], denoiser: Denoiser) -> tuple[int, ...]:
    """Positions of the chosen units; all units if none are given.

    Raises:
        ValueError: if a unit does not exist, or is given twice
    """
    depth = len(denoiser.units)
    check_units(who, units, depth, f"this {denoiser.name}")
    if len(set(units)) < len(units):
        raise ValueError(f"{who}: name each unit once, got {list(units)}")
    return units or tuple(range(depth))


# ---- what edits say of parameters -----------------------------------------------------------------------------------


def trains(denoiser: Denoiser, name: str) -> bool:
    """Whether a parameter (full name) is trained: if an edit added it, or no edit freezes it."""
    applied = denoiser.applied.values()
    return any(e.owns(name) for e in applied) or all(e.trainable(name) for e in applied)


def grouped(denoiser: Denoiser) -> dict[str, Group]:
    """How the optimiser treats each parameter (full name) of which an edit says so (`Edit.groups`).

    Raises:
        ValueError: if there is no such parameter, or two edits contradict each other
    """
    found: dict[str, Group] = {}
    for name, edit in denoiser.applied.items():
        for key, group in _known(denoiser, name, edit.groups(denoiser), "groups").items():
            try:
                found[key] = found[key].joined(group) if key in found else group
            except ValueError as error:
                raise ValueError(f"optimiser group of {key}: {error}; leave one of the edits out") from error
    return found


def per_token(denoiser: Denoiser) -> int:
    """How many parameter elements a token is computed with (`Edit.activated`); fractions of several edits multiply.

    Raises:
        ValueError: if an edit names no parameter, or says a fraction that is none
    """
    shares: dict[str, float] = {}
    for name, edit in denoiser.applied.items():
        for key, share in _known(denoiser, name, edit.activated(denoiser), "activated").items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: activated is a fraction, 0 to 1, of {key} it is {share}")
            shares[key] = shares.get(key, 1.0) * share
    return sum(round(p.numel() * shares.get(key, 1.0)) for key, p in denoiser.named_parameters())


def _known(denoiser: Denoiser, name: str, said: Mapping[str, T], what: str) -> Mapping[str, T]:
    """What an edit says of parameters. Raises ValueError if one of them is not there."""
    if said and (odd := next(iter(said.keys() - {n for n, _ in denoiser.named_parameters()}), None)):
        raise ValueError(f"{name}: `{what}` names {odd}, and this {denoiser.name} has no such parameter")
    return said


def shards(denoiser: Denoiser) -> list[nn.Module]:
    """Modules that edits want gathered by themselves (`Edit.shards`), inner ones before those around them.

    Raises:
        ValueError: if one is no part of the denoiser, or has no parameters
    """
    wanted: dict[int, str] = {}
    for name, edit in denoiser.applied.items():
        wanted |= {id(m): name for m in edit.shards(denoiser)}
    found = [m for m in denoiser.modules() if id(m) in wanted and next(m.parameters(), None) is not None]
    if lost := wanted.keys() - {id(m) for m in found}:
        who = wanted[next(iter(lost))]
        raise ValueError(f"{who}: `shards` names a module that is no part of the {denoiser.name} or has no parameters")
    return found[::-1]


@contextmanager
def without(denoiser: Denoiser) -> Iterator[Denoiser]:
    """The denoiser inside the block without all edits that can be switched off (`Edit.off`).

    Raises:
        ValueError: if there is none
    """
    with ExitStack() as stack:
        switches = [s for e in denoiser.applied.values() if (s := e.off(denoiser)) is not None]
        if not switches:
            raise ValueError(f"this {denoiser.name} has no edit that could be switched off: apply one first")
        for switch in switches:
            stack.enter_context(switch)
        yield denoiser


# ---- fold, describe, rebuild ----------------------------------------------------------------------------------------


def fold(denoiser: Denoiser, *names: str) -> Denoiser:
    """Make applied edits permanent, the last applied first; without names, all applied edits.

    Raises:
        ValueError: if a name is not applied, if an edit applied later stays live, if an edit cannot be folded, or if
            the live edits could not be applied again to the folded model
    """
    names = names or tuple(denoiser.applied)
    if unknown := [n for n in names if n not in denoiser.applied]:
        raise ValueError(f"no edit named {unknown[0]!r} is applied; there are: {', '.join(denoiser.applied) or 'none'}")
    for name in reversed(list(denoiser.applied)):
        if name not in names:
            later = [n for n in list(denoiser.applied) if n in names]
            if later:
                raise ValueError(f"cannot fold {later[0]!r} under {name!r}, which was applied later: fold both")
            break
        denoiser.applied[name].fold(denoiser)
        if left := next(gone(denoiser.model, name), None):
            raise ValueError(
                f"{name} cannot be folded: it has replaced {left.path}, and nothing has come back in its place: keep "
                "it as an edit of the artifact"
            )
        denoiser.folded.insert(0, {"name": name, **describe(denoiser.applied.pop(name))})
        if name in denoiser.edits:
            del denoiser.edits[name]
    denoiser.base = _base(denoiser)
    return denoiser


def compact(denoiser: Denoiser, state: Mapping[str, Tensor] | None = None) -> Denoiser:
    """What is left of a trained denoiser at inference (`Edit.compact`), under the same names and in the same order.

    The base is built once more and the edits are applied to it, so that all their surgery refers to the new parts. The
    denoiser itself stays as it was.

    Args:
        denoiser: in any state; its weights are read unless `state` is given
        state: full `denoiser.state_dict()` to read instead (gathered from shards)

    Returns:
        Another denoiser around the same weights; the given one where no edit has anything to do.

    Raises:
        ValueError: if what an edit left does not fit the edit that it left
    """
    if all(type(e).compact is Edit.compact for e in denoiser.applied.values()):
        return denoiser
    state = dict(denoiser.state_dict() if state is None else state)
    whole = rebuilt(denoiser, denoiser.applied, state, "the state to compact")
    edits = dict(denoiser.applied)
    for name, e in whole.applied.items():
        if (left := e.compact(whole.edits[name] if name in whole.edits else None)) is None:
            continue
        edits[name], own = left
        state = {k: v for k, v in state.items() if not k.startswith(f"edits.{name}.")}
        state |= {f"edits.{name}.{k}": v for k, v in ({} if own is None else own.state_dict()).items()}
    if all(edits[name] is e for name, e in denoiser.applied.items()):
        return denoiser
    return rebuilt(denoiser, edits, state, "the state that Edit.compact left")


def rebuilt(denoiser: Denoiser, edits: Mapping[str, Edit], state: Mapping[str, Tensor], what: str) -> Denoiser:
    """The base of a denoiser with copies of these edits around these very tensors, in the same mode.

    Raises:
        ValueError: if names or shapes of the state, `what` it is in words, are not those of the edits on the base
    """
    with torch.device("meta"):
        twin = apply(
            denoiser.family.from_config(denoiser.base), {name: replace(e) for name, e in edits.items()}, fresh=False
        )  # type: ignore[type-var]
    check_layout(twin.state_dict(), state, what)
    twin.load_state_dict(state, assign=True)
    twin.folded, twin.gradient_checkpointing = list(denoiser.folded), denoiser.gradient_checkpointing
    trainable = {n: p.requires_grad for n, p in denoiser.named_parameters()}
    for n, p in twin.named_parameters():
        p.requires_grad_(trainable.get(n, True))
    return twin.train(denoiser.training)


def _base(denoiser: Denoiser) -> dict:
    """The configuration to which a reader applies the live edits again.

    The former base, unless a folded edit has changed the structure; then the present configuration.
    """
    for base in (denoiser.base, denoiser.config):
        try:
            with torch.device("meta"):
                live = {name: replace(e) for name, e in denoiser.applied.items()}  # type: ignore[type-var]
                twin = apply(denoiser.family.from_config(base), live, fresh=False)
        except ValueError:
            continue
        if twin.config == denoiser.config:
            return base
    live = ", ".join(denoiser.applied)
    raise ValueError(f"{live} cannot stay live under what was folded, both change the structure: fold them together")


def describe(value: Any) -> dict[str, Any]:
    """Import path and fields of a dataclass as JSON values; `rebuild` is the inverse."""

    def plain(v: Any) -> Any:
        if is_dataclass(v) and not isinstance(v, type):
            return describe(v)
        if isinstance(v, (list, tuple)):
            return [plain(i) for i in v]
        if isinstance(v, Mapping):
            return {k: plain(i) for k, i in v.items()}
        return v

    fields = {k: plain(getattr(value, k)) for k in asdict(value)}
    return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **fields}


def rebuild(node: Any, trusted: tuple[str, ...] = (), kind: type = object) -> Any:
    """Build the object that `describe` wrote. The values come from outside: `edit.inputs.trust` limits them.

    Args:
        node: JSON values
        trusted: packages besides `edit` whose classes may be built
        kind: class of the result

    Raises:
        ValueError: if a path leads outside those packages, names no dataclass or one of another kind than its place
            expects, or has other fields
    """
    trust.refuse_deep(node)
    if kind is not object and not (isinstance(node, Mapping) and "_target_" in node):
        raise ValueError(f"the artifact holds {trust.cut(node)} where {trust.said((kind,))} was expected")
    return _rebuild(node, ("edit", *trusted), (kind,))


def _rebuild(node: Any, packages: tuple[str, ...], kinds: trust.Kinds) -> Any:
    if isinstance(node, list):
        return tuple(_rebuild(v, packages, kinds) for v in node)
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {k: _rebuild(v, packages, kinds) for k, v in node.items()}
    cls = trust.named(path := node["_target_"], packages, kinds)
    if not is_dataclass(cls):
        raise ValueError(f"the artifact asks for {path}, which is not a dataclass")
    fields = {k: v for k, v in node.items() if k != "_target_"}
    takes = trust.check_arguments(cls, fields)
    given = {k: _rebuild(v, packages, trust.accepted(takes[k])) for k, v in fields.items()}
    try:
        return cls(**given)
    except ValueError:
        raise
    except Exception as error:  # a class may raise anything for a value of another type
        reason = f"{type(error).__name__}: {trust.cut(str(error), quoted=False)}"
        raise ValueError(f"the artifact's {path} does not fit this version of edit: {reason}") from error
