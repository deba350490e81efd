"""`jaxft plan`: from flags to a table, a JSON object or a chart."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft.configuration import for_method as replayed
from jaxft.configuration.rules import CHOICES
from jaxft.errors import UserError, counted, nearest
from jaxft.methods import METHODS
from jaxft.planning.plan import Plan, find_batch, placements, plan, variants
from jaxft.planning.report import draw, sharding_table, table
from jaxft.planning.topology import Devices, local_devices, tpu_devices

QUANTIZED = ("none", "nf4", "int4", "int8")


def main(
    config: ConfigDict,
    *,
    topology: str = "",
    device: str = "",
    as_json: bool = False,
    methods: str = "",
    remats: str = "",
    schemes: str = "",
    show: bool = False,
    find: bool = False,
    plot: str = "",
    price: float = 0.0,
    for_method: Callable[[str], ConfigDict] | None = None,
) -> list[Plan]:
    """Plans as asked and prints; returns the plans.

    Args:
        config: of the run.
        topology: a TPU slice, as v5e:4x4.
        device: local, where no topology is given.
        as_json: print JSON instead of a table.
        methods: names with commas between, or all; "": the configuration's.
        remats: kinds of recomputation with commas between, or all; "": the configuration's.
        schemes: what the base is quantized to, likewise.
        show: print how each leaf lies on the mesh, and compile nothing.
        find: look for the largest batch that fits, instead.
        plot: a file for a chart.
        price: of a device for an hour.
        for_method: gives the configuration for another method; by default what differs in `config` from its
            recipe's defaults is put over the other's.

    Raises:
        UserError: no device to plan for is given.
    """
    if bool(topology) == bool(device) or device not in ("", "local"):
        raise UserError("plan: give --topology KIND:SHAPE, as v5e:4x4, or --device local")
    if topology:
        jax.config.update("jax_platforms", "cpu")  # the plan is made here, for devices elsewhere
    target = tpu_devices(topology) if topology else local_devices()
    if show:
        print("\n".join(sharding_table(placements(config, target))))
        return []
    if find:
        best, plans = find_batch(config, target)
        if best is None:
            least = counted(plans[0].batch_size, "row")
            print(f"plan: no batch fits, not even of {least}", file=sys.stderr)
        plans = [best] if best else plans[:1]
    else:
        asked = _asked(config, for_method, methods, schemes, remats)
        plans = [_said(each, target) for each in asked]
    if as_json:
        objects = [dataclasses.asdict(each) | _cost(each, price) for each in plans]
        print(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2))
    else:
        print("\n".join(table(plans, price)))
    if plot:
        draw(plans, Path(plot))
    return plans


def _asked(
    config: ConfigDict,
    for_method: Callable[[str], ConfigDict] | None,
    methods: str,
    schemes: str,
    remats: str,
) -> list[ConfigDict]:
    if not (methods or schemes or remats):
        return [config]
    return list(
        variants(
            for_method or functools.partial(replayed, config),
            _names("--methods", methods, tuple(METHODS)) or (config.method.name,),
            _names("--quantize", schemes, QUANTIZED) or (config.base.quantize,),
            _names("--remats", remats, CHOICES["remat"]) or (config.remat,),
        )
    )


def _names(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = (
        known if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    )
    for name in names:
        if name not in known:
            raise UserError(
                f"{flag} takes all or some of {', '.join(known)}, not {name!r}{nearest(name, known)}"
            )
    return names


def _said(config: ConfigDict, target: Devices) -> Plan:
    said = f"{config.method.name}, base {config.base.quantize}, remat {config.remat}"
    print(f"compiling {said}, {counted(config.batch_size, 'row')}", file=sys.stderr)
    return plan(config, target)


def _cost(each: Plan, price: float) -> dict[str, Any]:
    return {"cost": each.hours * each.devices * price} if price and each.hours else {}
