CREATE TABLE autostart (
        server TEXT PRIMARY KEY,
        ord INTEGER NOT NULL,
        was TEXT NOT NULL,
        tries INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        message TEXT NOT NULL
    ) STRICT;

CREATE TABLE events (
        revision INTEGER PRIMARY KEY AUTOINCREMENT,
        at INTEGER NOT NULL,
        server TEXT NOT NULL,
        doc TEXT NOT NULL
    ) STRICT;

CREATE TABLE image_files (image TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

CREATE TABLE image_holders (
        image TEXT NOT NULL REFERENCES images (id),
        holder TEXT NOT NULL,
        PRIMARY KEY (image, holder)
    ) STRICT, WITHOUT ROWID;

CREATE TABLE image_requests (
        request_id TEXT PRIMARY KEY,
        body_hash TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        doc TEXT
    ) STRICT;

CREATE TABLE images (id TEXT PRIMARY KEY, name TEXT NOT NULL, doc TEXT NOT NULL) STRICT;

CREATE TABLE known_definitions (
        server TEXT NOT NULL,
        plan TEXT NOT NULL,
        xml TEXT NOT NULL,
        in_force INTEGER NOT NULL,
        PRIMARY KEY (server, plan)
    ) STRICT;

CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE observations (
        server INTEGER PRIMARY KEY REFERENCES servers (ord) ON DELETE CASCADE,
        revision INTEGER NOT NULL,
        at INTEGER NOT NULL,
        source TEXT NOT NULL
    ) STRICT;

CREATE TABLE operations (
        ord INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL,
        request_id TEXT UNIQUE,
        body_hash TEXT NOT NULL,
        final INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        plan TEXT,
        doc TEXT NOT NULL
    ) STRICT;

CREATE INDEX operations_of_server ON operations (server, ord);

CREATE INDEX operations_under_way ON operations (ord) WHERE final = 0;

CREATE TABLE room (filler BLOB NOT NULL) STRICT;

CREATE TABLE saved_definitions (
        server TEXT PRIMARY KEY,
        plan TEXT NOT NULL,
        xml TEXT NOT NULL
    ) STRICT;

CREATE TABLE servers (
        ord INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        doc TEXT NOT NULL
    ) STRICT;
