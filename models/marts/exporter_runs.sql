with
    runs as (select * from {{ source('analytics_raw', '_exporter_runs') }}),

    timed as (

        select
            *,
            extract(epoch from finished_at - started_at)::double precision as seconds,
            row_number() over (partition by key order by id desc) = 1 as is_last

        from runs

    )

select
    id,
    key,
    command,
    status,
    started_at,
    finished_at,
    seconds,
    rows_read,
    rows_written,
    rows_unchanged,
    rows_deleted,
    rows_swept,
    batches,
    bytes,
    rows_read / nullif(seconds, 0) as rows_per_second,
    cursor_value,
    cursor_id,
    error,
    is_last

from timed
