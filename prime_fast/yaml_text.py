"""The YAML of configurations: 1e-4 is a number, as in YAML 1.2; a date is a text; no tags, and no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")  # those that YAML 1.1 takes for texts
TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"tags ({event.tag}) have no use", event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} comes twice", key.start_mark)
            seen.add(name)
        return node


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))


def read(text: str) -> Any:
    """Raises ValueError, one line without its subject, for what is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more digits than Python converts
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split()):.300}") from error
    except RecursionError as error:
        raise ValueError("is not valid YAML: it is nested too deeply") from error


def write(tree: dict) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
