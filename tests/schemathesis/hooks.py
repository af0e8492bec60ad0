"""Fills ids from a pool with another tenant's in it, and fails every answer that shows something of that tenant."""

import json
import os
import random

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


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    path = context.operation.path
    if path_parameters and "id" in path_parameters and random.random() < 0.7:
        known = ids(path)
        if known:
            path_parameters["id"] = random.choice(known)
    return path_parameters


@schemathesis.hook
def map_query(context, query):
    foreign = POOL["foreign"]
    if query and foreign and random.random() < 0.3:
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
