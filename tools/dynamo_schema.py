"""Take what a DynamoGraphDeployment may contain out of Dynamo's CRD, for tests/deploy.

    python tools/dynamo_schema.py CRD.yaml > tests/deploy/schemas/dynamographdeployment.json

The CRD is deploy/operator/config/crd/bases/nvidia.com_dynamographdeployments.yaml of Dynamo's repository. Of
its 1.6 MB the schema of v1beta1 remains, without descriptions and `status`, which the operator writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1beta1"


def of(crd: Path) -> dict[str, Any]:
    """Return the OpenAPI schema of `VERSION` in the CRD. Raises LookupError where there is none."""
    document = yaml.load(crd.read_text(), Loader=yaml.CSafeLoader)
    for version in document["spec"]["versions"]:
        if version["name"] == VERSION:
            schema: dict[str, Any] = _bare(version["schema"]["openAPIV3Schema"])
            del schema["properties"]["status"]
            return schema
    raise LookupError(f"{crd} has no version {VERSION}")


def _bare(node: Any) -> Any:
    """Return the schema without descriptions. A property may bear that name: its value is no text."""
    if isinstance(node, list):
        return [_bare(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        name: _bare(value)
        for name, value in node.items()
        if not (name == "description" and isinstance(value, str))
    }


if __name__ == "__main__":
    json.dump(of(Path(sys.argv[1])), sys.stdout, indent=1)
    print()
