#!/usr/bin/env python3
"""Runs schemathesis against a control plane, as a tenant, as the operator and as a gate.

    tests/schemathesis/run.py http://127.0.0.1:8081 --admin-token-file data/admin.token --feed-token-file data/feed.token

Needs `pip install schemathesis`. The tenant's ids and another tenant's are both in the pool that paths and queries are
filled from; `hooks.py` fails every answer that shows anything of the other tenant, and afterwards the other tenant's
keys, tokens, sessions and audit log must be what they were before.
"""

import argparse
import json
import os
import pathlib
import secrets
import subprocess
import sys
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).parent


def call(base, method, path, body=None, headers=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, headers or {}, method=method)
    if data is not None:
        request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request) as response:
        return json.load(response)["data"], response.headers


def tenant(base):
    email = f"{secrets.token_hex(8)}@example.com"
    password = "your-secure-password"
    made, _ = call(base, "POST", "/api/v1/register", {"name": "Fuzzed", "email": email, "password": password})
    login, headers = call(base, "POST", "/api/v1/login", {"email": email, "password": password})
    cookie = headers["set-cookie"].split(";")[0]
    token, _ = call(base, "POST", "/api/v1/tokens", {"name": "fuzz"}, {"cookie": cookie})
    bearer = {"authorization": "Bearer " + token["token"]}
    call(base, "POST", "/api/v1/keys", {"name": "k", "environment": "live", "scopes": []}, bearer)
    keys, _ = call(base, "GET", "/api/v1/keys", headers=bearer)
    return {
        "organization": made["organizationId"],
        "user": login["userId"],
        "email": email,
        "keys": [item["id"] for item in keys["items"]],
        "token_id": token["id"],
        "session": login["sessionId"],
        "token": token["token"],
        "cookie": cookie,
    }


def state(base, who):
    """Everything of a tenant that nobody else may change. Reading it must not change it either."""
    bearer = {"authorization": "Bearer " + who["token"]}
    seen = {}
    for path in ["/api/v1/keys?limit=100", "/api/v1/tokens", "/api/v1/audit?limit=100", "/api/v1/organization"]:
        seen[path] = call(base, "GET", path, headers=bearer)[0]
    seen["sessions"] = call(base, "GET", "/api/v1/sessions", headers={"cookie": who["cookie"]})[0]
    text = json.dumps(seen)
    data = json.loads(text)
    for item in data["/api/v1/tokens"]["items"] + data["sessions"]["items"]:
        item.pop("lastUsedAt")
    return data


def show_revoked_keys(base, operator):
    """DELETE revokes a key: from then on its own tenant and the operator are shown it as revoked, and nobody can change
    it."""
    who = tenant(base)
    token = {"authorization": "Bearer " + who["token"]}
    for caller, place in ((token, "/api/v1/keys"), (operator, "/api/v1/admin/keys")):
        key = call(base, "POST", "/api/v1/keys", {"name": "k", "environment": "live", "scopes": []}, token)[0]["id"]
        call(base, "DELETE", f"{place}/{key}", headers=caller)
        shown = call(base, "GET", f"{place}/{key}", headers=caller)[0]
        assert shown["status"] == "revoked" and shown["revokedAt"], shown
        try:
            call(base, "PATCH", f"{place}/{key}", {"name": "other"}, caller)
        except urllib.error.HTTPError as refused:
            assert refused.code == 409, refused
        else:
            raise AssertionError("a revoked key was renamed")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--admin-token-file", required=True)
    parser.add_argument("--feed-token-file", required=True)
    parser.add_argument("--examples", default="60", help="examples per operation")
    parser.add_argument("--roles", default="token,session,operator,gate")
    parser.add_argument("--seed", help="of an earlier run, to repeat it")
    parser.add_argument("--schemathesis", default="schemathesis")
    arguments = parser.parse_args()
    base = arguments.url.rstrip("/")
    read = lambda path: pathlib.Path(path).read_text().strip()
    admin = "Bearer " + read(arguments.admin_token_file)
    show_revoked_keys(base, {"authorization": admin})
    victim = tenant(base)
    failed = []
    for role in arguments.roles.split(","):
        attacker = tenant(base)
        before = state(base, victim)
        pool = {"own": attacker, "foreign": victim}
        # All checks, by default; `--checks all` would overrule the one exception in `schemathesis.toml`.
        command = [arguments.schemathesis, "run", base + "/openapi.json", "--max-examples",
                   arguments.examples, "--continue-on-failure", "--workers", "1", "--exclude-operation-id", "followKeys"]
        if arguments.seed:
            command += ["--seed", arguments.seed]
        if role == "token":
            command += ["--header", "Authorization: Bearer " + attacker["token"]]
            # A token cannot sign in; registering would only fill the database.
            command += ["--exclude-tag", "Operator", "--exclude-tag", "Feed", "--exclude-operation-id", "register",
                        "--exclude-operation-id", "login"]
        elif role == "session":
            command += ["--header", "Cookie: " + attacker["cookie"], "--include-tag", "Account",
                        "--exclude-operation-id", "register", "--exclude-operation-id", "login",
                        "--exclude-operation-id", "logout",
                        # The cookie is sent with every request, so a request without it cannot be made; that one
                        # without a valid session is refused is `ignored_auth`'s to show.
                        "--exclude-checks", "negative_data_rejection"]
        elif role == "operator":
            command += ["--header", "Authorization: " + admin, "--include-tag", "Operator"]
            # The operator may read and write everything.
            pool = {"own": attacker, "foreign": None}
        elif role == "gate":
            command += ["--header", "Authorization: Bearer " + read(arguments.feed_token_file), "--include-tag", "Feed"]
            pool = {"own": attacker, "foreign": None}
        print(f"== as {role}", flush=True)
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "hooks.py"), "TOLLGATE_POOL": json.dumps(pool)}
        config = HERE / "schemathesis.toml"
        command[1:1] = ["--config-file", str(config)]
        if subprocess.run(command, env=environment).returncode != 0:
            failed.append(role)
        if pool["foreign"] and state(base, victim) != before:
            print("the other tenant's data was changed")
            failed.append(role + " (foreign data)")
    print("failed: " + ", ".join(failed) if failed else "all roles passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
