-- A music shop: the shapes of tables that people have, in the manner of the well-known samples.
create schema sales;
create schema audit;

create type sales."OrderState" as enum ('open', 'paid', 'sent back');
create domain email as text check (value like '%@%');

-- mixed case, a timestamp that the application keeps; a comment with what dbt takes for Jinja
create table "Artist" (
    "ArtistId" int primary key,
    "Name" text not null,
    "websiteURL" text,
    "createdAt" timestamp(3) not null default now(),
    "updatedAt" timestamp(3) not null default now()
);
comment on table "Artist" is 'Who made the music. {{ not a variable }}';
comment on column "Artist"."websiteURL" is 'Where to read more: "https://…"';

-- no timestamp: only new rows can be told
create table albums (
    id int generated always as identity primary key,
    title text not null,
    artist_id int not null references "Artist",
    price numeric(10, 2),
    released date
);
comment on column albums.released is 'Day of the release,
not of the recording.';

-- words of SQL as names, some rows without the cursor
create table track (
    id uuid primary key default gen_random_uuid(),
    "order" smallint not null,
    "user" text,
    title text not null,
    album_id int references albums,
    length interval,
    tags text [],
    last_update timestamptz
);

create table customer (
    customer_id bigserial primary key,
    "First Name" text,
    mail email,
    preferences jsonb,
    birth_date date,
    created_at timestamptz not null default now(),
    modified timestamptz not null default now()
);
create index on customer (modified, customer_id);

-- another schema, a name that is a keyword, an enum
create table sales."Order" (
    "OrderID" bigint primary key,
    customer_id bigint references customer,
    state sales."OrderState" not null default 'open',
    invoice_date date,
    updated_at timestamptz not null default now()
);

-- a composite key
create table sales."OrderLine" (
    "OrderID" bigint references sales."Order",
    line_no smallint,
    track_id uuid,
    quantity int not null,
    unit_price numeric,
    updated_at timestamptz not null default now(),
    primary key ("OrderID", line_no)
);

-- no primary key: a log
create table audit.log (
    at timestamptz not null default clock_timestamp(),
    logged_at timestamptz not null default clock_timestamp(),
    what text
);

-- partitioned by day
create table payment (
    payment_id bigint generated always as identity,
    amount numeric not null,
    paid_on date not null,
    last_update timestamptz not null default now(),
    primary key (payment_id, paid_on)
) partition by range (paid_on);
create table payment_2025 partition of payment for values from ('2025-01-01') to ('2026-01-01');
create table payment_later partition of payment default;

-- no column that grows
create table playlist_track (
    playlist text,
    track uuid,
    primary key (playlist, track)
);

create view latest_orders as
select "OrderID" as id, state, updated_at from sales."Order";
comment on view latest_orders is 'Orders, for people.';

insert into "Artist" select n, 'Artist ' || n, null, now(), now() - n * interval '1 hour'
from generate_series(1, 40) n;
insert into albums (title, artist_id, price, released)
select 'Album ' || n, 1 + n % 40, n * 1.25, date '2020-01-01' + n from generate_series(1, 90) n;
insert into track ("order", title, album_id, length, tags, last_update)
select n % 12, 'Track ' || n, 1 + n % 90, n * interval '1 second', array['a' || n % 3],
    case when n % 10 > 0 then now() - n * interval '1 minute' end
from generate_series(1, 300) n;
insert into customer ("First Name", mail, preferences)
select 'Name ' || n, n || '@example.org', jsonb_build_object('n', n) from generate_series(1, 60) n;
insert into sales."Order" select n, 1 + n % 60, (enum_range(null::sales."OrderState"))[1 + n % 3],
    current_date, now() - n * interval '1 minute' from generate_series(1, 120) n;
insert into sales."OrderLine" select 1 + n % 120, n / 120, null, n, n * 0.5, now()
from generate_series(0, 359) n;
insert into audit.log (at, logged_at, what)
select now() - interval '1 day', now() - interval '1 day', 'event ' || n
from generate_series(1, 25) n;
insert into payment (amount, paid_on) select n, date '2025-12-20' + n % 30
from generate_series(1, 80) n;
insert into playlist_track select 'p' || n % 3, gen_random_uuid() from generate_series(1, 9) n;
