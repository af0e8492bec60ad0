-- What is in the ledger beyond `applied_through` was kept as one row for each batch. Numbers can be missing for good: of
-- batches that a gate merged before it sent them, or that a restored backup does not have. Every later batch of the run
-- then left a row and read all those before it. As stretches they are as many rows as there are gaps.
CREATE TABLE usage_ahead (
    gate  TEXT NOT NULL,
    run   TEXT NOT NULL,
    first INTEGER NOT NULL,
    last  INTEGER NOT NULL CHECK (last >= first),
    PRIMARY KEY (gate, run, first)
) STRICT, WITHOUT ROWID;

INSERT INTO usage_ahead (gate, run, first, last)
SELECT gate, run, min(sequence), max(sequence)
FROM (SELECT gate, run, sequence,
             sequence - row_number() OVER (PARTITION BY gate, run ORDER BY sequence) AS stretch
      FROM usage_overtaken)
GROUP BY gate, run, stretch;

DROP TABLE usage_overtaken;
