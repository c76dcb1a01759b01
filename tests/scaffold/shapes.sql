-- Tables as applications leave them: nothing here was made with a loader in mind.
create schema "Back Office";
create type mood as enum ('sad', 'so-so', 'happy');

-- mixed case, no stamp
create table "UserAccount" (
    "userId" int primary key,
    "displayName" text,
    "Mood" mood not null default 'so-so'
);
insert into "UserAccount" select n, 'User ' || n, (enum_range(null::mood))[1 + n % 3]
from generate_series(1, 50) n;

-- names that differ in case alone
create table orders (id bigint generated always as identity primary key, total numeric);
insert into orders (total) select n * 1.5 from generate_series(1, 70) n;
create table "Orders" (id bigint primary key, total numeric, note text);
insert into "Orders" select n, -n, null from generate_series(1, 7) n;

-- names that need quotes, a word of SQL, a key of two columns
create table "select" (
    "from" text,
    "group by" int,
    "100 %" numeric,
    "Ünïcode" text[],
    "quote""d" jsonb default '{"a": [1, null]}',
    "yes" boolean default true,
    primary key ("from", "group by")
);
insert into "select" ("from", "group by", "100 %", "Ünïcode")
select 'x' || n % 3, n, n / 7.0, array['ä', null, 'n' || n] from generate_series(1, 40) n;

-- no key: a log
create table page_view (at timestamptz, path text);
insert into page_view select now() - n * interval '1 minute', '/' || n % 5
from generate_series(1, 90) n;
insert into page_view select at, path from page_view where path = '/1';  -- the same again

-- partitions, one of them in partitions
create table measurement (
    sensor int not null,
    day date not null,
    value double precision,
    primary key (sensor, day)
) partition by range (day);
create table measurement_old partition of measurement default;
create table measurement_2026 partition of measurement
for values from ('2026-01-01') to ('2027-01-01') partition by list (sensor);
create table measurement_2026_low partition of measurement_2026 for values in (1, 2, 3);
create table measurement_2026_rest partition of measurement_2026 default;
insert into measurement select s, date '2025-12-20' + d, s * d / 3.0
from generate_series(1, 6) s, generate_series(0, 25) d;

-- a unique key, no primary key; a stamp with an index
create table coupon (
    code varchar(20) not null unique,
    percent smallint,
    updated_at timestamptz not null default now()
);
create index on coupon (updated_at);
insert into coupon select 'C' || n, n % 100 from generate_series(1, 30) n;

-- a stamp without an index, which is null in some rows
create table customer (id uuid primary key default gen_random_uuid(), updated_at timestamp);
insert into customer (updated_at) select case when n % 3 > 0 then now() end
from generate_series(1, 25) n;

-- another schema, whose name needs quotes; one name in two schemas; a column computed
create table "Back Office".customer (
    id int primary key,
    net numeric(10, 2) not null,
    gross numeric generated always as (net * 1.19) stored
);
insert into "Back Office".customer select n, n * 3 from generate_series(1, 15) n;

-- empty; a number as its name
create table "2024" (id serial primary key, at time, "when" tstzrange);

create view happy_users as select * from "UserAccount" where "Mood" = 'happy';
