-- Every staged event is in the model, in the version that staging holds.
select staged.old_id

from {{ ref('stg_stat_event') }} as staged

left join {{ ref('stat_event') }} as built on staged.old_id = built.old_id

where built.old_id is null or built._exported_at <> staged._exported_at
