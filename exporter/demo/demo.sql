create type "StatEventType" as enum ('click', 'print', 'apply', 'account');
create type "StatSource" as enum ('api', 'widget', 'campaign', 'seo', 'jstag', 'publisher');
create type "StatEventStatus" as enum (
    'PENDING', 'VALIDATED', 'CANCEL', 'CANCELED', 'REFUSED', 'CARRIED_OUT'
);

create table "StatEvent" (
    id text primary key,
    type "StatEventType" not null,
    created_at timestamp(3) not null default current_timestamp,
    updated_at timestamp(3) not null,
    click_id text,
    referer text,
    host text,
    is_bot boolean not null default false,
    is_human boolean not null default false,
    source "StatSource" not null,
    source_id text,
    from_publisher_id text,
    to_publisher_id text,
    mission_id text,
    mission_client_id text,
    tag text,
    tags text [],
    status "StatEventStatus",
    custom_attributes jsonb
);

create index "StatEvent_updated_at_id_idx" on "StatEvent" (updated_at, id);
