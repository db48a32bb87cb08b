//! The request grammar: any text parses or says where it is wrong; what parses is written in
//! a form that parses to the same, and a node can be asked for it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use p2pit_protocol::{
    inventory::{Capacity, Gpu, GpuUuid},
    request::{Request, fit_many, satisfiable},
};

fn machine() -> Capacity {
    let gpu = |n: u8, model: &str, gib: u64| Gpu {
        uuid: GpuUuid(format!("GPU-{n}")),
        model: model.to_owned(),
        full_name: model.to_owned(),
        memory_bytes: gib << 30,
        simulated: false,
    };
    let gpus = vec![gpu(1, "v100", 32), gpu(2, "v100", 16), gpu(3, "3090", 24)];
    Capacity::new(gpus, 16, 65_536)
}

fuzz_target!(|text: &str| {
    match text.parse::<Request>() {
        Ok(request) => {
            assert_eq!(request.check(), Ok(()));
            let shown = request.to_string();
            assert_eq!(shown.parse(), Ok(request.clone()));
            let machine = machine();
            let wanted: Vec<_> = (0..)
                .zip(&request.groups)
                .map(|(index, group)| (index, group.count, &group.process))
                .collect();
            let mut left = machine.clone();
            for (_, grant) in fit_many(&wanted, &machine) {
                assert!(left.take(&grant), "{shown} gave something twice");
            }
            if let Err(why) = satisfiable(&request, &[machine.clone(), machine]) {
                assert!(!why.to_string().is_empty());
            }
        }
        Err(error) => {
            assert!(text.is_char_boundary(error.byte()));
            assert!(!error.caret().is_empty() && error.place().0 >= 1);
        }
    }
});
