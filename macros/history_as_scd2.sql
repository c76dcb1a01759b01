{% macro history_as_scd2(relation, key) %}
    {%- set names = [] -%}
    {%- for name in ([key] if key is string else key) -%}
        {%- do names.append('"' ~ name.strip('"') ~ '"') -%}
    {%- endfor -%}
    {%- set keys = names | join(', ') %}
    select ended.*, ended.valid_to is null as is_current
    from
        (
            select
                began.*,
                lead(began.valid_from) over (
                    partition by {{ keys }} order by began._lsn, began._seq
                ) as valid_to
            from
                (
                    -- never earlier than the version before, whatever the source's clock did
                    select
                        version.*,
                        max(version._committed_at) over (
                            partition by {{ keys }} order by version._lsn, version._seq
                        ) as valid_from
                    from {{ relation }} as version
                    -- of what one transaction made of a row, nobody saw but the last
                    where
                        not exists (
                            select
                            from {{ relation }} as later
                            where
                                {%- for name in names %}
                                    later.{{ name }} = version.{{ name }} and
                                {%- endfor %}
                                later._lsn = version._lsn
                                and later._seq > version._seq
                                and later._xid = version._xid
                        )
                        {%- if is_incremental() %}
                            and ({{ keys }}) in (
                                select {{ keys }}
                                from {{ relation }}
                                where
                                    _exported_at > (
                                        select coalesce(max(_exported_at), '-infinity')
                                        from {{ this }}
                                    )
                            )
                        {%- endif %}
                ) as began
        ) as ended
    where ended._op <> 'delete'
{% endmacro %}
