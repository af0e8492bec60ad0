-- Times are milliseconds since the Unix epoch. Lengths are limited here too, so that no path around the
-- service can fill a column. Secrets, passwords and tokens are never stored: digests and hashes only.

CREATE TABLE organizations (
    id            TEXT PRIMARY KEY CHECK (length(id) <= 23),
    name          TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    plan          TEXT NOT NULL CHECK (length(plan) <= 64),
    created_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX organizations_by_age ON organizations (created_at_ms, id);

CREATE TABLE users (
    id              TEXT PRIMARY KEY CHECK (length(id) <= 23),
    organization_id TEXT NOT NULL REFERENCES organizations (id),
    email           TEXT NOT NULL UNIQUE CHECK (length(email) <= 254),
    password_hash   TEXT NOT NULL CHECK (length(password_hash) <= 255),
    created_at_ms   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX users_by_organization ON users (organization_id);

CREATE TABLE invitations (
    id            TEXT PRIMARY KEY CHECK (length(id) <= 23),
    digest        BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    note          TEXT NOT NULL CHECK (length(note) <= 200),
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL,
    used_at_ms    INTEGER,
    used_by       TEXT REFERENCES organizations (id)
) STRICT, WITHOUT ROWID;

CREATE TABLE sessions (
    id              TEXT PRIMARY KEY CHECK (length(id) <= 23),
    digest          BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    user_id         TEXT NOT NULL REFERENCES users (id),
    created_at_ms   INTEGER NOT NULL,
    last_used_at_ms INTEGER NOT NULL,
    expires_at_ms   INTEGER NOT NULL,
    address         TEXT NOT NULL CHECK (length(address) <= 45),
    user_agent      TEXT NOT NULL CHECK (length(user_agent) <= 200)
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_user ON sessions (user_id);

CREATE TABLE tokens (
    id              TEXT PRIMARY KEY CHECK (length(id) <= 23),
    organization_id TEXT NOT NULL REFERENCES organizations (id),
    name            TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    digest          BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    last_four       TEXT NOT NULL CHECK (length(last_four) = 4),
    created_at_ms   INTEGER NOT NULL,
    expires_at_ms   INTEGER,
    last_used_at_ms INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX tokens_by_organization ON tokens (organization_id);

CREATE TABLE keys (
    id              TEXT PRIMARY KEY CHECK (length(id) <= 23),
    organization_id TEXT NOT NULL REFERENCES organizations (id),
    name            TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    environment     TEXT NOT NULL CHECK (length(environment) <= 32),
    prefix          TEXT NOT NULL CHECK (length(prefix) <= 32),
    scopes          TEXT NOT NULL CHECK (json_valid(scopes) AND length(scopes) <= 16384),
    created_at_ms   INTEGER NOT NULL,
    expires_at_ms   INTEGER,
    disabled        INTEGER NOT NULL CHECK (disabled IN (0, 1)),
    revoked_at_ms   INTEGER,
    last_used_at_ms INTEGER,
    revision        INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_by_organization ON keys (organization_id, created_at_ms, id);
CREATE INDEX keys_revoked ON keys (revoked_at_ms) WHERE revoked_at_ms IS NOT NULL;

-- The serial orders a key's secrets: the highest is the newest, and the only one that may lack a date of death.
CREATE TABLE key_secrets (
    serial          INTEGER PRIMARY KEY,
    key_id          TEXT NOT NULL REFERENCES keys (id),
    digest          BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    last_four       TEXT NOT NULL CHECK (length(last_four) = 4),
    created_at_ms   INTEGER NOT NULL,
    not_after_ms    INTEGER,
    last_used_at_ms INTEGER
) STRICT;
CREATE INDEX key_secrets_by_key ON key_secrets (key_id, serial);

-- The feed, as an outbox: written in the transaction of the change it tells of, read by every gate at its own pace.
-- One line per key, always its newest state, so that the table is both the log of changes and the snapshot.
CREATE TABLE feed_state (
    one      INTEGER PRIMARY KEY CHECK (one = 1),
    revision INTEGER NOT NULL,
    -- A gate whose revision is below this one has missed a forgotten `gone` line and needs a full snapshot.
    oldest   INTEGER NOT NULL
) STRICT;
INSERT INTO feed_state (one, revision, oldest) VALUES (1, 0, 0);

CREATE TABLE feed_lines (
    revision INTEGER PRIMARY KEY,
    key_id   TEXT NOT NULL UNIQUE,
    line     TEXT NOT NULL
) STRICT;

CREATE TABLE feed_gone (
    revision   INTEGER PRIMARY KEY,
    key_id     TEXT NOT NULL,
    gone_at_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE gates (
    name             TEXT PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 64),
    version          TEXT CHECK (length(version) <= 64),
    revision         INTEGER NOT NULL,
    last_heard_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The ledger.
CREATE TABLE usage_minutes (
    organization_id TEXT NOT NULL,
    minute          INTEGER NOT NULL,
    key_id          TEXT NOT NULL,
    tier            TEXT NOT NULL,
    environment     TEXT NOT NULL,
    permits         INTEGER NOT NULL CHECK (permits >= 0),
    PRIMARY KEY (organization_id, minute, key_id, tier, environment)
) STRICT, WITHOUT ROWID;

CREATE TABLE refusal_minutes (
    organization_id TEXT NOT NULL,
    minute          INTEGER NOT NULL,
    key_id          TEXT NOT NULL,
    tier            TEXT NOT NULL,
    environment     TEXT NOT NULL,
    code            TEXT NOT NULL,
    refusals        INTEGER NOT NULL CHECK (refusals >= 0),
    PRIMARY KEY (organization_id, minute, key_id, tier, environment, code)
) STRICT, WITHOUT ROWID;

-- Which batches are in the ledger: everything up to `applied_through` of a run, and the single ones above it that
-- overtook others. The second table is empty whenever nothing is missing, so neither grows with traffic.
CREATE TABLE usage_runs (
    gate            TEXT NOT NULL,
    run             TEXT NOT NULL,
    applied_through INTEGER NOT NULL,
    last_at_ms      INTEGER NOT NULL,
    PRIMARY KEY (gate, run)
) STRICT, WITHOUT ROWID;

CREATE TABLE usage_overtaken (
    gate     TEXT NOT NULL,
    run      TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    PRIMARY KEY (gate, run, sequence)
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
    serial          INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms           INTEGER NOT NULL,
    organization_id TEXT,
    actor_kind      TEXT NOT NULL,
    actor_id        TEXT NOT NULL CHECK (length(actor_id) <= 254),
    actor_name      TEXT NOT NULL CHECK (length(actor_name) <= 254),
    action          TEXT NOT NULL CHECK (length(action) <= 64),
    target_kind     TEXT NOT NULL CHECK (length(target_kind) <= 32),
    target_id       TEXT NOT NULL CHECK (length(target_id) <= 64),
    detail          TEXT NOT NULL CHECK (json_valid(detail)),
    address         TEXT NOT NULL CHECK (length(address) <= 45),
    user_agent      TEXT NOT NULL CHECK (length(user_agent) <= 200),
    request_id      TEXT NOT NULL CHECK (length(request_id) <= 128)
) STRICT;
CREATE INDEX audit_by_organization ON audit (organization_id, serial);
CREATE INDEX audit_by_target ON audit (target_id, serial);

CREATE TABLE idempotency (
    organization_id TEXT NOT NULL,
    operation       TEXT NOT NULL CHECK (length(operation) <= 64),
    idempotency_key TEXT NOT NULL CHECK (length(idempotency_key) <= 255),
    fingerprint     BLOB NOT NULL CHECK (length(fingerprint) = 32),
    outcome         TEXT NOT NULL,
    created_at_ms   INTEGER NOT NULL,
    PRIMARY KEY (organization_id, operation, idempotency_key)
) STRICT, WITHOUT ROWID;

-- Small facts about this installation, such as which organisation `tollgate dev` made.
CREATE TABLE facts (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
