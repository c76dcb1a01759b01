{{
    config(
        materialized='incremental',
        incremental_strategy='upsert',
        unique_key='old_id',
        indexes=[
            {'columns': ['old_id'], 'unique': true},
            {'columns': ['_exported_at']},
        ],
    )
}}

with
    events as (

        select *
        from {{ ref('stg_stat_event') }}

        {% if is_incremental() %} where {{ dbt_exporter.new_rows('_exported_at') }} {% endif %}

    ),

    types as (select * from {{ ref('stat_event_types') }})

select
    events.old_id,
    events.type,
    types.label as type_label,
    coalesce(types.is_conversion, false) as is_conversion,
    events.created_at,
    events.updated_at,
    events.click_id,
    events.referer,
    events.host,
    events.is_bot,
    events.is_human,
    events.source,
    events.is_widget,
    events.source_id,
    events.from_partner_id,
    events.to_partner_id,
    events.mission_id,
    events.mission_client_id,
    events.tag,
    events.tags,
    events.status,
    events.custom_attributes,
    events._exported_at

from events

left join types on events.type = types.type
