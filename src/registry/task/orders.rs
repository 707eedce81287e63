//! What each order does: rules, then the disk, then memory. A refused order changes nothing.

use std::sync::Arc;

use tracing::info;

use super::{HeldCheck, Order, Origin, Task, blocking_call, unavailable};
use crate::clock;
use crate::model::{CheckId, HealthStatus, InstanceId, NodeName};
use crate::registry::checks::Outcome;
use crate::registry::{
    CheckDefinition, ConfigDefinitions, ExternalNode, ExternalPart, ExternalWrite, Probe, RegistryError,
    ServiceDefinition, rules,
};

impl Task {
    pub(super) async fn execute(&mut self, order: Order) -> Result<(), RegistryError> {
        match order {
            Order::RegisterService { definition, replace_existing_checks } => {
                self.register_service(*definition, replace_existing_checks).await
            }
            Order::DeregisterService { id } => self.deregister_service(&id).await,
            Order::RegisterCheck { definition } => self.register_check(*definition).await,
            Order::DeregisterCheck { id } => self.deregister_check(&id).await,
            Order::UpdateTtl { id, status, output } => self.update_ttl(&id, status, output),
            Order::ReplaceConfig(config) => self.replace_config(*config).await,
            Order::RegisterExternal(write) => self.register_external(*write).await,
            Order::DeregisterExternal { node, part } => self.deregister_external(&node, &part).await,
            Order::NoteRemote { statuses } => {
                self.remote = statuses;
                self.dirty.note_remote();
                Ok(())
            }
        }
    }

    async fn register_service(
        &mut self,
        mut definition: ServiceDefinition,
        replace_existing_checks: bool,
    ) -> Result<(), RegistryError> {
        rules::in_scope(&definition, &(self.scope)())?;
        self.can_run(&definition.checks).await?;
        let id = definition.record.id.clone();
        let held = self.services.get(&id);
        if held.is_some_and(|held| held.origin == Origin::Config) {
            return Err(RegistryError::Invalid(format!(
                "service ID {:?} comes from a config file: change the file and reload, or register under another ID",
                id.as_str()
            )));
        }
        let old = held.map(|held| held.shown.definition.checks.as_slice()).unwrap_or_default();
        let is_named = |checks: &[CheckDefinition], id: &CheckId| checks.iter().any(|check| check.id == *id);
        let left: Vec<_> = old.iter().filter(|check| !is_named(&definition.checks, &check.id)).cloned().collect();
        let mut dropped: Vec<CheckId> = Vec::new();
        if replace_existing_checks {
            dropped.extend(left.into_iter().map(|check| check.id));
        } else {
            definition.checks.extend(left);
        }
        for (check_id, check) in self.checks.iter().filter(|(_, check)| check.alone == Some(Origin::Api)) {
            let of_this = check.shown.definition.service.as_ref() == Some(&id);
            // Maintenance is set and ended by hand alone.
            let by_hand = check.shown.definition.probe == Probe::Static;
            let replaced = is_named(&definition.checks, check_id) || (replace_existing_checks && !by_hand);
            if of_this && replaced {
                dropped.push(check_id.clone());
            }
        }
        let others = self.definitions().filter(|service| service.record.id != id);
        let services: Vec<_> = others.chain([&definition]).collect();
        let alone: Vec<_> = self.alone(None).filter(|check| !dropped.contains(&check.id)).collect();
        rules::hold_together(&services, &alone, self.external_bytes())?;

        let (stored, gone) = (definition.clone(), dropped.clone());
        // A check that moves from the table of its own into the service keeps its status.
        self.on_disk(move |store| store.replace_service(&stored, &gone)).await?;
        let moved = |id: &CheckId| is_named(&definition.checks, id);
        for check in dropped.iter().filter(|check| !moved(check)) {
            self.drop_check(check);
        }
        info!(service = %id, name = %definition.record.name, "registered service");
        self.set_service(definition, Origin::Api, clock::now());
        Ok(())
    }

    pub(super) async fn deregister_service(&mut self, id: &InstanceId) -> Result<(), RegistryError> {
        if !self.services.contains_key(id) {
            return Err(RegistryError::UnknownService { id: id.to_string() });
        }
        let of_this = |check: &&HeldCheck| check.shown.definition.service.as_ref() == Some(id);
        let checks: Vec<_> =
            self.checks.values().filter(of_this).map(|check| check.shown.definition.id.clone()).collect();
        let (stored_id, stored_checks) = (id.clone(), checks.clone());
        self.on_disk(move |store| store.forget_service(&stored_id, &stored_checks)).await?;
        for check in &checks {
            self.drop_check(check);
        }
        self.services.remove(id);
        self.dirty.structure = true;
        info!(service = %id, "deregistered service");
        Ok(())
    }

    async fn register_external(&mut self, write: ExternalWrite) -> Result<(), RegistryError> {
        let name = write.node.clone();
        let held = self.externals.get(&name);
        let node = Arc::new(ExternalNode::written(held.map(|held| &**held), write, &(self.scope)())?);
        if held == Some(&node) {
            return Ok(());
        }
        let is_new = held.is_none();
        let mut externals = self.externals.clone();
        externals.insert(name.clone(), Arc::clone(&node));
        self.external_fits(&externals)?;
        self.on_disk(move |store| store.put_external(&node)).await?;
        self.externals = externals;
        self.dirty.structure = true;
        if is_new {
            info!(node = %name, "registered a node without an agent");
        }
        Ok(())
    }

    async fn deregister_external(&mut self, name: &NodeName, part: &ExternalPart) -> Result<(), RegistryError> {
        let Some(held) = self.externals.get(name) else {
            // One that was left out at the start is on disk still.
            let name = name.clone();
            return match part {
                ExternalPart::Node => self.on_disk(move |store| store.remove_external(&name)).await,
                ExternalPart::Service(_) | ExternalPart::Check(_) => Ok(()),
            };
        };
        let left = held.without(part).map(Arc::new);
        if left.as_ref() == Some(held) {
            return Ok(());
        }
        match left {
            Some(left) => {
                let stored = Arc::clone(&left);
                self.on_disk(move |store| store.put_external(&stored)).await?;
                self.externals.insert(name.clone(), left);
            }
            None => {
                let stored = name.clone();
                self.on_disk(move |store| store.remove_external(&stored)).await?;
                self.externals.remove(name);
                info!(node = %name, "deregistered a node without an agent");
            }
        }
        self.dirty.structure = true;
        Ok(())
    }

    async fn register_check(&mut self, definition: CheckDefinition) -> Result<(), RegistryError> {
        if let Some(service) = &definition.service
            && !self.services.contains_key(service)
        {
            return Err(RegistryError::UnknownService { id: service.to_string() });
        }
        self.can_run(std::slice::from_ref(&definition)).await?;
        let held = self.checks.get(&definition.id);
        if held.is_some_and(|held| held.alone == Some(Origin::Config)) {
            return Err(RegistryError::Invalid(format!(
                "check ID {:?} comes from a config file: change the file and reload, or register under another ID",
                definition.id.as_str()
            )));
        }
        if let Some(held) = held
            && held.alone.is_none()
            && held.shown.definition.service == definition.service
            && let Some(service) = definition.service.as_ref().and_then(|id| self.services.get(id))
        {
            let origin = service.origin;
            let mut changed = service.shown.definition.clone();
            changed.checks.retain(|check| check.id != definition.id);
            changed.checks.push(definition);
            return self.change_service(changed, origin, None).await;
        }
        let services: Vec<_> = self.definitions().collect();
        let others = self.alone(None).filter(|check| check.id != definition.id);
        let alone: Vec<_> = others.chain([&definition]).collect();
        rules::hold_together(&services, &alone, self.external_bytes())?;
        if let Some(held) = held
            && held.shown.definition.service != definition.service
        {
            let id = definition.id.as_str();
            return Err(RegistryError::Invalid(format!(
                "Invalid check: the ID {id:?} is taken by a check of another service; deregister that one, or give this one another ID"
            )));
        }
        let stored = definition.clone();
        self.on_disk(move |store| store.put_check(&stored)).await?;
        self.set_check(definition, Some(Origin::Api), clock::now());
        Ok(())
    }

    async fn deregister_check(&mut self, id: &CheckId) -> Result<(), RegistryError> {
        let Some(held) = self.checks.get(id) else {
            return Err(RegistryError::UnknownCheck { id: id.to_string() });
        };
        let service = held.shown.definition.service.as_ref().filter(|_| held.alone.is_none());
        if let Some(service) = service.and_then(|id| self.services.get(id)) {
            let origin = service.origin;
            let mut changed = service.shown.definition.clone();
            changed.checks.retain(|check| check.id != *id);
            return self.change_service(changed, origin, Some(id.clone())).await;
        }
        let stored = id.clone();
        self.on_disk(move |store| store.remove_check(&stored)).await?;
        self.drop_check(id);
        Ok(())
    }

    /// Puts a service with other checks in place of itself; one of a config file changes until the next reload.
    async fn change_service(
        &mut self,
        definition: ServiceDefinition,
        origin: Origin,
        dropped: Option<CheckId>,
    ) -> Result<(), RegistryError> {
        let others = self.definitions().filter(|service| service.record.id != definition.record.id);
        let services: Vec<_> = others.chain([&definition]).collect();
        rules::hold_together(&services, &self.alone(None).collect::<Vec<_>>(), self.external_bytes())?;
        let (stored, gone) = (definition.clone(), Vec::from_iter(dropped));
        match origin {
            Origin::Api => self.on_disk(move |store| store.replace_service(&stored, &gone)).await?,
            Origin::Config => {}
        }
        self.set_service(definition, origin, clock::now());
        Ok(())
    }

    fn update_ttl(&mut self, id: &CheckId, status: HealthStatus, output: String) -> Result<(), RegistryError> {
        let Some(check) = self.checks.get_mut(id) else {
            return Err(RegistryError::UnknownCheck { id: id.to_string() });
        };
        if !matches!(check.shown.definition.probe, Probe::Ttl { .. }) {
            return Err(RegistryError::NotTtl { id: id.to_string() });
        }
        let change = check.state.refresh(Outcome { status, output }, clock::now());
        self.note_change(id, change);
        Ok(())
    }

    /// Refuses checks that this agent does not or cannot run.
    async fn can_run(&self, checks: &[CheckDefinition]) -> Result<(), RegistryError> {
        rules::may_run(checks, self.scripts, Origin::Api)?;
        for check in checks {
            if let Some(why) = unavailable(&self.tools, &check.probe).await {
                return Err(RegistryError::Invalid(format!("Invalid check: {why}")));
            }
        }
        Ok(())
    }

    async fn replace_config(&mut self, config: ConfigDefinitions) -> Result<(), RegistryError> {
        let ConfigDefinitions { services, checks, scripts, settings } = config;
        self.config_is_right(&services, &checks, scripts)?;
        if let Some(settings) = settings {
            let tools = std::sync::Arc::clone(&self.tools);
            blocking_call(move || tools.reload(settings)).await.map_err(RegistryError::Invalid)?;
        }
        self.scripts = scripts;
        let is_new = |id: &InstanceId| services.iter().any(|service| service.record.id == *id);
        let from_config = self.services.iter().filter(|(_, held)| held.origin == Origin::Config);
        let gone: Vec<InstanceId> = from_config.map(|(id, _)| id.clone()).filter(|id| !is_new(id)).collect();
        for id in gone {
            self.deregister_service(&id).await?;
        }
        let is_new = |id: &CheckId| checks.iter().any(|check| check.id == *id);
        let from_config = self.checks.iter().filter(|(_, held)| held.alone == Some(Origin::Config));
        let gone: Vec<CheckId> = from_config.map(|(id, _)| id.clone()).filter(|id| !is_new(id)).collect();
        for id in gone {
            info!(check = %id, "check is in no config file any more");
            self.deregister_check(&id).await?;
        }
        let now = clock::now();
        for service in services {
            self.warn_unavailable(&service.checks).await;
            self.set_service(service, Origin::Config, now);
        }
        for check in checks {
            self.warn_unavailable(std::slice::from_ref(&check)).await;
            self.set_check(check, Some(Origin::Config), now);
        }
        Ok(())
    }
}
