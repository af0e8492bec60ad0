"""Fills ids from a pool with another tenant's in it, and fails every answer that shows something of that tenant, or a
revoked key as anything but revoked."""

import json
import os
import zlib

import schemathesis

POOL = json.loads(os.environ.get("TOLLGATE_POOL", "null")) or {"own": None, "foreign": None}


def ids(path):
    """The ids that fit a path: one's own and the other tenant's. One's own session, which the run needs, is left out."""
    found = []
    for name in ("own", "foreign"):
        who = POOL[name]
        if who is None:
            continue
        if "/keys/" in path:
            found += who["keys"]
        elif "/organizations/" in path:
            found.append(who["organization"])
        elif name == "foreign" and "/sessions/" in path:
            found.append(who["session"])
        elif name == "foreign" and "/tokens/" in path:
            found.append(who["token_id"])
    return found


def number(generated):
    """What is chosen depends on what was generated and on nothing else, so that a case comes out the same when it is
    tried again."""
    return zlib.crc32(repr(generated).encode())


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    path = context.operation.path
    if path_parameters and "id" in path_parameters:
        drawn = number(path_parameters)
        known = ids(path)
        if known and drawn % 10 < 7:
            path_parameters["id"] = known[drawn // 10 % len(known)]
    return path_parameters


@schemathesis.hook
def map_query(context, query):
    foreign = POOL["foreign"]
    if query and foreign and number(query) % 10 < 3:
        for name, value in (("q", foreign["keys"][0]), ("key", foreign["keys"][0]), ("target", foreign["keys"][0]),
                            ("actor", foreign["token_id"])):
            if name in query:
                query[name] = value
    return query


@schemathesis.check
def shows_nothing_foreign(ctx, response, case):
    foreign = POOL["foreign"]
    if foreign is None or response.status_code >= 400:
        return
    # A cursor or a filter that was sent may come back; what is compared is what the answer alone can know.
    text = response.text
    for name in ("organization", "user", "email", "session", "token_id"):
        assert foreign[name] not in text, f"the answer shows the other tenant's {name}"
    for key in foreign["keys"]:
        assert key not in text, "the answer shows the other tenant's key"


REVOKED = set()


@schemathesis.check
def a_revoked_key_stays_revoked(ctx, response, case):
    """In the place of `use_after_free`, which `schemathesis.toml` takes from those that show a key: what was revoked once
    is shown as revoked by every later answer of the run, alone and in lists. But for a replay, which repeats what was
    answered when its `Idempotency-Key` came for the first time."""
    path, method = case.operation.path, case.operation.method.upper()
    if response.status_code != 200 or "/keys" not in path:
        return
    data = response.json()["data"]
    shown = data["items"] if "items" in data else [data]
    if method == "DELETE":
        REVOKED.update(key["id"] for key in shown)
    for key in shown:
        if key.get("id") in REVOKED and "status" in key and not key.get("replayed"):
            assert key["status"] == "revoked" and key["revokedAt"], f"a revoked key is shown as {key['status']}"
