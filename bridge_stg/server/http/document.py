"""The OpenAPI document: what FastAPI derives from the routes, with the limits of this server and its event streams.

A schema states all that one can state, so that a request that agrees with it is rejected only for what it refers to: a
video that does not exist, a file that is no video, a full queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bridge_stg.evaluation import schema

TEXT = r"[^\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]*"
LATIN_1 = r"[0-9A-Za-z\u00aa\u00b2\u00b3\u00b5\u00b9\u00ba\u00bc-\u00be\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff]"
QUERY_PATTERN = rf"^{TEXT}({LATIN_1}|[^\x00-\u00ff\s]){TEXT}$"
"""Letters and digits, or characters beyond Latin-1, and no control characters: see `check_query`.

It has no classes such as `\\w`, which mean different characters in Python and in ECMAScript.
"""
MEDIA_TYPES = "video/mp4, video/quicktime, video/x-matroska, video/webm, video/x-msvideo, image/*"
NUMBER = r"[0-9]+(\.[0-9]+)?"
BOX_PATTERN = f"^{NUMBER}(,{NUMBER}){{3}}$"


def stream_of(events: dict[str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a stream of events: the schema of the data of each event by its name."""
    items = [
        {
            "type": "object",
            "properties": {"event": {"const": name}, "data": json_data(data), "id": {"type": "string"}},
            "required": ["event", "data"],
        }
        for name, data in events.items()
    ]
    return {200: {"content": {"text/event-stream": {"itemSchema": {"oneOf": items}}}}}


def json_data(data: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the data of an event, a text in JSON."""
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": data}


def form_or_json(model: type[BaseModel], name: str) -> dict[str, Any]:
    """Return the OpenAPI description of a JSON body, or of a form with a file instead of the field `name`."""
    of_json = model.model_json_schema()
    fields = {key: _in_form(value) for key, value in of_json["properties"].items() if key != name}
    required = ["file", *(key for key in of_json["required"] if key != name)]
    file = {"type": "string", "format": "binary", "description": "The video or image."}
    form: dict[str, Any] = {"type": "object", "required": required, "properties": {"file": file, **fields}}
    form["additionalProperties"] = False
    if "first_box" in fields:
        fields["first_box"] |= {"type": "string", "pattern": BOX_PATTERN}
        form["oneOf"] = track_or_not({"type": "string"}, no_box=False)
    content = {
        "multipart/form-data": {"schema": form, "encoding": {"file": {"contentType": MEDIA_TYPES}}},
        "application/json": {"schema": of_json},
    }
    return {"requestBody": {"required": True, "content": content}}


def track_or_not(box: dict[str, Any], *, no_box: Any) -> list[dict[str, Any]]:
    """Return what a request has without the task `track`, and with it, which needs a box and takes one query."""
    others = {"properties": {"task": {"enum": ["tube", "span", "image"]}, "first_box": no_box}}
    track = {"properties": {"task": {"const": "track"}, "first_box": box, "queries": {"maxItems": 1}}}
    return [others, {**track, "required": ["task", "first_box"]}]


def _in_form(field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field of a form, in which null cannot be written."""
    some = [one for one in field.get("anyOf", []) if one.get("type") != "null"]
    return {key: value for key, value in field.items() if key != "anyOf"} | (some[0] if some else {})


def link(path: str, **fields: str) -> dict[str, Any]:
    """Return the OpenAPI description of a POST whose body has fields of this response, by their names there."""
    body = {name: f"$response.body#/{field}" for name, field in fields.items()}
    return {"operationRef": f"#/paths/{path.replace('/', '~1')}/post", "requestBody": body}


def component(name: str) -> dict[str, Any]:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def complete(
    document: dict[str, Any], of_events: Sequence[type[BaseModel]], *, max_queries: int, max_query_chars: int
) -> None:
    """Complete FastAPI's document in place.

    Errors become JSON; `of_events` and the events of live sources are defined; lists of queries get their limits.
    """
    for operations in document["paths"].values():
        for operation in operations.values():
            responses = operation["responses"]
            for code, response in list(responses.items()):
                if code.isdecimal() and int(code) >= 400 and (content := response.get("content")):
                    # FastAPI gives an error the media type of the route's answers, and describes its own form of 422.
                    response["content"] = {"application/json": next(iter(content.values()))}
                    if response["content"]["application/json"].get("schema") == component("HTTPValidationError"):
                        del responses[code]
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update({name.capitalize(): schema.inlined(name) for name in ("round", "event")})
    _, more = models_json_schema(
        [(model, "serialization") for model in of_events], ref_template="#/components/schemas/{model}"
    )
    schemas.update(more["$defs"])
    _limit(document, {"maxItems": max_queries}, {"maxLength": max_query_chars})


def _limit(value: Any, of_list: dict[str, int], of_query: dict[str, int]) -> None:
    """Add the limits of a server to all lists of queries."""
    if isinstance(value, dict):
        items = value.get("items")
        if isinstance(items, dict) and items.get("pattern") == QUERY_PATTERN:
            value.update(of_list)
            items.update(of_query)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _limit(inner, of_list, of_query)
