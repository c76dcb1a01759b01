-- migrate:up
create schema if not exists "analytics_raw";

create table "analytics_raw"."stat_event" (
    "id" text not null,
    "type" text,
    "created_at" timestamp(3) without time zone,
    "updated_at" timestamp(3) without time zone,
    "click_id" text,
    "referer" text,
    "host" text,
    "is_bot" boolean,
    "is_human" boolean,
    "source" text,
    "source_id" text,
    "from_publisher_id" text,
    "to_publisher_id" text,
    "mission_id" text,
    "mission_client_id" text,
    "tag" text,
    "tags" text[],
    "status" text,
    "custom_attributes" jsonb,
    "_exported_at" timestamptz not null,
    primary key ("id")
) with (fillfactor = 90);

-- migrate:down
drop table "analytics_raw"."stat_event";
