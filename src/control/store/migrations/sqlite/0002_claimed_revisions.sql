-- A revision that a gate claims and that was never made here, from a later life of a database that was restored since.
ALTER TABLE gates ADD COLUMN claimed INTEGER NOT NULL DEFAULT 0;
