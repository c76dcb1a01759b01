with
    source as (select * from {{ source('analytics_raw', 'stat_event') }}),

    renamed as (

        select
            id as old_id,
            type,
            created_at,
            updated_at,
            click_id,
            referer,
            host,
            is_bot,
            is_human,
            case when source = 'publisher' then 'api' else source end as source,
            source = 'widget' as is_widget,
            source_id,
            from_publisher_id as from_partner_id,
            to_publisher_id as to_partner_id,
            mission_id,
            mission_client_id,
            tag,
            tags,
            status,
            custom_attributes,
            _exported_at

        from source

        where source_id is not null

    )

select *
from renamed
